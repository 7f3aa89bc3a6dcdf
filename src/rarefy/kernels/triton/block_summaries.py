"""Blocks of tokens summed up as they were before rotary embedding, which is undone on the way: one read of each
token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

NEVER = -1  # the place of a summary that is not asked for


@triton.jit
def _summaries(
    x, cos, sin, out, stride_b, stride_h, stride_n, stride_t, stride_ab, heads, blocks, tokens,
    D: tl.constexpr, HALF: tl.constexpr, SPAN: tl.constexpr, COUNT: tl.constexpr, MAX: tl.constexpr, MIN: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    block, pair = tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    within, channel = tl.arange(0, SPAN), tl.arange(0, HALF)
    inside = (channel < D // 2)[None, :]
    place = block * COUNT + within
    real = ((within < COUNT) & (place < tokens))[:, None]
    start = x + row * stride_b + head * stride_h + block.to(tl.int64) * stride_n
    at = start + within[:, None].to(tl.int64) * stride_t + channel[None, :]
    low = tl.load(at, mask=real & inside, other=0.0).to(tl.float32)
    high = tl.load(at + D // 2, mask=real & inside, other=0.0).to(tl.float32)
    angle = row * stride_ab + place[:, None].to(tl.int64) * D + channel[None, :]
    cos_low = tl.load(cos + angle, mask=real & inside, other=1.0)
    cos_high = tl.load(cos + angle + D // 2, mask=real & inside, other=1.0)
    sin_low = tl.load(sin + angle, mask=real & inside, other=0.0)
    sin_high = tl.load(sin + angle + D // 2, mask=real & inside, other=0.0)
    first = (low * cos_low + high * sin_low) / (cos_low * cos_low + sin_low * sin_low)
    second = (high * cos_high - low * sin_high) / (cos_high * cos_high + sin_high * sin_high)
    number = tl.sum(real.to(tl.float32))
    wide = (MAX >= 0) + (MIN >= 0) + (MEAN >= 0)
    end = out + ((row * heads + head) * blocks + block) * wide * D + channel
    ours = channel < D // 2
    if MAX >= 0:
        tl.store(end + MAX * D, tl.max(tl.where(real, first, float("-inf")), 0), mask=ours)
        tl.store(end + MAX * D + D // 2, tl.max(tl.where(real, second, float("-inf")), 0), mask=ours)
    if MIN >= 0:
        tl.store(end + MIN * D, tl.min(tl.where(real, first, float("inf")), 0), mask=ours)
        tl.store(end + MIN * D + D // 2, tl.min(tl.where(real, second, float("inf")), 0), mask=ours)
    if MEAN >= 0:
        tl.store(end + MEAN * D, tl.sum(first, 0) / number, mask=ours)
        tl.store(end + MEAN * D + D // 2, tl.sum(second, 0) / number, mask=ours)


def block_summaries(
    x: Tensor, cos: Tensor, sin: Tensor, kinds: Sequence[str], tokens: int | None = None, *, num_warps: int = 4
) -> Tensor:
    """Blocks ``x [B, H, N, block, D]`` of rotated tokens, of which the first ``tokens`` of all blocks count (None:
    all), summed up as they were before: float32 ``[B, H, N, len(kinds) * D]``, for ``kinds`` among ``max``, ``min`` and
    ``mean``. ``cos`` and ``sin`` float32 ``[B or 1, tokens, D]``; all channels are rotated, halves in pairs."""
    batch, heads, blocks, span, channels = x.shape
    cos, sin = (part.float().contiguous() for part in (cos, sin))
    out = torch.empty(batch, heads, blocks, len(kinds) * channels, device=x.device)
    places = {kind.upper(): kinds.index(kind) if kind in kinds else NEVER for kind in ("max", "min", "mean")}
    _summaries[(blocks, batch * heads)](
        x, cos, sin, out, *x.stride()[:4], 0 if cos.shape[0] == 1 else cos.stride(0), heads, blocks,
        blocks * span if tokens is None else tokens, D=channels, HALF=triton.next_power_of_2(channels // 2),
        SPAN=triton.next_power_of_2(span), COUNT=span, **places, num_warps=num_warps,
    )  # fmt: skip
    return out
