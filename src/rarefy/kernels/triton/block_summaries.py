"""Blocks of tokens summed up as they were before rotary embedding, which is undone on the way: one read of each
token, and of its angles one for several heads."""

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
    MEAN: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    block, row, lead = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * HEADS
    within, channel = tl.arange(0, SPAN), tl.arange(0, HALF)
    ours = channel < D // 2
    place = block * COUNT + within
    real = ((within < COUNT) & (place < tokens))[:, None]
    here = real & ours[None, :]
    angle = row * stride_ab + place[:, None].to(tl.int64) * D + channel[None, :]
    cos_low = tl.load(cos + angle, mask=here, other=1.0).to(tl.float32)
    cos_high = tl.load(cos + angle + D // 2, mask=here, other=1.0).to(tl.float32)
    sin_low = tl.load(sin + angle, mask=here, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angle + D // 2, mask=here, other=0.0).to(tl.float32)
    low_size, high_size = cos_low * cos_low + sin_low * sin_low, cos_high * cos_high + sin_high * sin_high
    cos_low, sin_low = cos_low / low_size, sin_low / low_size
    cos_high, sin_high = cos_high / high_size, sin_high / high_size
    number = tl.sum(real.to(tl.float32))
    wide = (MAX >= 0) + (MIN >= 0) + (MEAN >= 0)
    start = x + row * stride_b + block.to(tl.int64) * stride_n
    start += within[:, None].to(tl.int64) * stride_t + channel[None, :]
    for head in range(lead, tl.minimum(lead + HEADS, heads)):
        at = start + head * stride_h
        low = tl.load(at, mask=here, other=0.0).to(tl.float32)
        high = tl.load(at + D // 2, mask=here, other=0.0).to(tl.float32)
        first, second = low * cos_low + high * sin_low, high * cos_high - low * sin_high
        end = out + ((row * heads + head) * blocks + block) * wide * D + channel
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
    x: Tensor, cos: Tensor, sin: Tensor, kinds: Sequence[str], tokens: int | None = None, *,
    heads_at_once: int | None = None, num_warps: int = 4,
) -> Tensor:  # fmt: skip
    """Blocks ``x [B, H, N, block, D]`` of rotated tokens, of which the first ``tokens`` of all blocks count (None:
    all), summed up as they were before: float32 ``[B, H, N, len(kinds) * D]``, for ``kinds`` among ``max``, ``min`` and
    ``mean``. ``cos`` and ``sin`` ``[B or 1, tokens, D]``; all channels are rotated, halves in pairs."""
    batch, heads, blocks, span, channels = x.shape
    # More share angles; fewer leave more programs.
    heads_at_once = heads_at_once or max(1, min(8, heads // 4))
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(batch, heads, blocks, len(kinds) * channels, device=x.device)
    places = {kind.upper(): kinds.index(kind) if kind in kinds else NEVER for kind in ("max", "min", "mean")}
    _summaries[(blocks, triton.cdiv(heads, heads_at_once), batch)](
        x, cos, sin, out, *x.stride()[:4], 0 if cos.shape[0] == 1 else cos.stride(0), heads, blocks,
        blocks * span if tokens is None else tokens, D=channels, HALF=triton.next_power_of_2(channels // 2),
        SPAN=triton.next_power_of_2(span), COUNT=span, **places, HEADS=heads_at_once, num_warps=num_warps,
    )  # fmt: skip
    return out
