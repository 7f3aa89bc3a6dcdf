"""Means of blocks of tokens, and how alike a block's tokens are, with one read of each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _means(
    x, out, alike, stride_b, stride_h, stride_n, stride_t, heads, blocks,
    D: tl.constexpr, DP: tl.constexpr, COUNT: tl.constexpr, SPAN: tl.constexpr, LIKENESS: tl.constexpr,
):  # fmt: skip
    head, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    within, channel = tl.arange(0, SPAN), tl.arange(0, DP)
    at = x + row * stride_b + head * stride_h + block.to(tl.int64) * stride_n
    at += within[:, None].to(tl.int64) * stride_t + channel[None, :]
    values = tl.load(at, mask=(within < COUNT)[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)
    place = (row * heads + head) * blocks + block
    tl.store(out + place * D + channel, (tl.sum(values, 0) / COUNT).to(out.dtype.element_ty), mask=channel < D)
    if LIKENESS:
        length = tl.maximum(tl.sqrt(tl.sum(values * values, 1)), 1e-12)
        total = tl.sum(values / length[:, None], 0)
        tl.store(alike + place, tl.sum(total * total, 0) / (COUNT * COUNT))


def block_means(x: Tensor, likeness: bool = False) -> tuple[Tensor, Tensor]:
    """Means of blocks ``x [B, H, N, block, D]``, in its dtype ``[B, H, N, D]``, and with ``likeness`` the mean cosine
    between all pairs of a block's tokens, float32 ``[B, H, N, 1]`` (else nothing is written there). Blocks may overlap;
    channels are contiguous. A block is read as one tile."""
    batch, heads, blocks, span, channels = x.shape
    out = torch.empty(batch, heads, blocks, channels, dtype=x.dtype, device=x.device)
    alike = torch.empty(batch, heads, blocks, 1, device=x.device)
    tokens, wide = triton.next_power_of_2(span), triton.next_power_of_2(channels)
    _means[(heads, blocks, batch)](
        x, out, alike, *x.stride()[:4], heads, blocks, D=channels, DP=wide, COUNT=span, SPAN=tokens,
        LIKENESS=likeness, num_warps=max(1, min(8, tokens * wide // 2048)),
    )  # fmt: skip
    return out, alike
