"""Weights in the layout of ``kernels/cuda/layout.py`` times activations, in Triton: the portable form of ``linear.cu``.

A program multiplies ``16 * TILES`` rows by ``TOKENS`` tokens. A word holds codes of two rows, ``g`` and ``g + 8`` of a
tile, so there are two sums, and each of the few places in a word gives one small product over all words of a step: no
code moves between lanes. Of one bit, words are of either row in turn, and what the other's meet are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.kernels.cuda.code import Code

BITS = (1, 2, 4, 8)
GROUPS = 128  # columns that may share a scale: one step, or whole steps


@dataclass(frozen=True)
class Tuning:
    """``tiles`` of 16 rows and ``tokens`` of a program; ``split`` programs share a row's columns."""

    tiles: int = 8
    tokens: int = 16
    split: int = 1
    num_warps: int = 4
    num_stages: int = 3


def fits(code: Code) -> bool:
    """Whether the kernel reads this code: one scale for a step, codes that a word holds evenly, no table."""
    whole = code.group == 0 or code.group % code.step == 0
    one = isinstance(code.scale, torch.dtype)
    return code.bits in BITS and code.span == 8 and not code.table and whole and one


@triton.jit
def _codes(words, SHIFT: tl.constexpr, BITS: tl.constexpr, CENTER: tl.constexpr, X: tl.constexpr):
    """The codes at one place of words, less ``CENTER``, as numbers of type ``X``."""
    codes = (words >> SHIFT) & ((1 << BITS) - 1)
    if BITS == 8:
        return (codes - CENTER).to(X)
    # In the mantissa of a power of two: conversions of whole numbers are slow.
    if X == tl.bfloat16:  # noqa: SIM300
        return (codes | 0x4300).to(tl.int16).to(X, bitcast=True) - (128.0 + CENTER)
    return (codes | 0x6400).to(tl.int16).to(X, bitcast=True) - (1024.0 + CENTER)


@triton.jit
def _add(
    low, high, words, own, x, SHIFT: tl.constexpr, GAP: tl.constexpr, BITS: tl.constexpr, CENTER: tl.constexpr
):  # fmt: skip
    """Add the products of the codes at one place of all words with their columns of ``x [tokens, words]``. The codes of
    the rows ``g + 8`` lie ``GAP`` bits higher than those of the rows ``g``; without a gap, words that are ``own`` are
    the rows' ``g``."""
    first = tl.trans(x)
    second = first
    if GAP == 0:
        first = tl.trans(tl.where(own[None, :], x, 0.0))
        second = tl.trans(tl.where(own[None, :], 0.0, x))
    low = tl.dot(_codes(words, SHIFT, BITS, CENTER, x.dtype).to(x.dtype), first, low)
    high = tl.dot(_codes(words, SHIFT + GAP, BITS, CENTER, x.dtype).to(x.dtype), second, high)
    return low, high


@triton.jit
def _linear(
    codes, scale, zero, x, y, rows, columns, steps, groups, tokens, stride, multiplier,
    BITS: tl.constexpr, GROUP_STEPS: tl.constexpr, CENTER: tl.constexpr, ZERO: tl.constexpr, TILES: tl.constexpr,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr, LOADS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    last_tile = tl.cdiv(rows, 16) - 1
    WORDS: tl.constexpr = 4 * LOADS  # of a lane
    INSIDE: tl.constexpr = 8 if BITS == 1 else 4 // BITS if BITS < 8 else 1  # blocks of 16 columns in a word
    NEAR: tl.constexpr = 4 if BITS < 8 else 2  # neighbouring columns of a word
    line = tl.arange(0, 8 * TILES)
    tile, g = tl.minimum(block * TILES + line // 8, last_tile).to(tl.int64), line % 8
    place = tl.arange(0, 4 * WORDS)  # load, then t, then word
    word, t = place // 16 * 4 + place % 4, place // 4 % 4
    TIMES: tl.constexpr = 0.5 if BITS == 1 else 1.0  # that each column is counted once
    GAP: tl.constexpr = 0 if BITS == 1 else BITS
    NEXT: tl.constexpr = BITS + GAP
    own = word % 2 == 0
    if BITS == 1:
        word = word // 2
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    sum_low = tl.zeros((8 * TILES, TOKENS), tl.float32)
    sum_high = tl.zeros((8 * TILES, TOKENS), tl.float32)
    share = tl.cdiv(steps, SPLIT)
    for step in range(part * share, tl.minimum(steps, part * share + share)):
        base = (tile * steps + step) * (LOADS * 128) + g * 16
        offset = place // 16 * 128 + place % 16
        words = tl.load(codes + base[:, None] + offset[None, :])
        low = tl.zeros((8 * TILES, TOKENS), tl.float32)
        high = tl.zeros((8 * TILES, TOKENS), tl.float32)
        ones = tl.zeros((TOKENS,), tl.float32)
        for inside in tl.static_range(INSIDE):
            if BITS == 8:
                column = step * STEP + word // 4 * 32 + t * 8 + word // 2 % 2 * 4 + word % 2 * 2
            else:
                block_of = word * INSIDE + inside
                column = step * STEP + block_of // 2 * 32 + t * 8 + block_of % 2 * 4
            near = column[:, None] + tl.arange(0, NEAR)[None, :]
            here = (token < tokens)[:, None, None] & (near < columns)[None, :, :]
            tokens_here = tl.load(
                x + token.to(tl.int64)[:, None, None] * stride + near[None, :, :], mask=here, other=0.0
            )
            if ZERO:
                ones += tl.sum(tl.sum(tokens_here.to(tl.float32), 2), 1) * TIMES
            if BITS == 8:
                x0, x1 = tl.split(tokens_here)
                low, high = _add(low, high, words, own, x0, 0, 16, BITS, CENTER)
                low, high = _add(low, high, words, own, x1, 8, 16, BITS, CENTER)
            else:
                even, odd = tl.split(tl.reshape(tokens_here, (TOKENS, 4 * WORDS, 2, 2)))
                x0, x2 = tl.split(even)
                x1, x3 = tl.split(odd)
                low, high = _add(low, high, words, own, x0, 2 * NEXT * inside, GAP, BITS, CENTER)
                low, high = _add(low, high, words, own, x1, 2 * NEXT * inside + 16, GAP, BITS, CENTER)
                low, high = _add(low, high, words, own, x2, 2 * NEXT * inside + NEXT, GAP, BITS, CENTER)
                low, high = _add(low, high, words, own, x3, 2 * NEXT * inside + NEXT + 16, GAP, BITS, CENTER)
        pair = (tile * groups + tl.minimum(step // GROUP_STEPS, groups - 1)) * 16 + g * 2
        if ZERO:
            low += (CENTER - tl.load(zero + pair).to(tl.float32))[:, None] * ones[None, :]
            high += (CENTER - tl.load(zero + pair + 1).to(tl.float32))[:, None] * ones[None, :]
        sum_low += low * tl.load(scale + pair).to(tl.float32)[:, None]
        sum_high += high * tl.load(scale + pair + 1).to(tl.float32)[:, None]
    row = (block * TILES + line // 8) * 16 + g
    out = y + part.to(tl.int64) * tokens * rows + token.to(tl.int64)[None, :] * rows + row[:, None]
    real = (token < tokens)[None, :]
    TO: tl.constexpr = y.dtype.element_ty
    tl.store(out, (sum_low * multiplier).to(TO), mask=real & (row < rows)[:, None])
    tl.store(out + 8, (sum_high * multiplier).to(TO), mask=real & (row + 8 < rows)[:, None])


def linear(
    code: Code, tuning: Tuning, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, rows: int,
    multiplier: float = 1.0,
) -> Tensor:  # fmt: skip
    """``x [M, K]`` in float16 or bfloat16 times the weight of ``codes [tiles, steps, loads, 32, 4]``, ``scale`` and
    ``zero [tiles, groups, 8, 2]``; result ``[M, rows]``."""
    tokens, columns = x.shape
    steps, loads = codes.shape[1:3]
    split = tuning.split
    y = x.new_empty(tokens, rows) if split == 1 else x.new_empty(split, tokens, rows, dtype=torch.float32)
    grid = (triton.cdiv(rows, 16 * tuning.tiles), split, triton.cdiv(tokens, tuning.tokens))
    _linear[grid](
        codes, scale, scale if zero is None else zero, x, y, rows, columns, steps, scale.shape[1], tokens, x.stride(0),
        multiplier, BITS=code.bits, GROUP_STEPS=code.group // code.step or steps, CENTER=code.center,
        ZERO=zero is not None, TILES=tuning.tiles, TOKENS=tuning.tokens, SPLIT=split, LOADS=loads, STEP=code.step,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages,
    )  # fmt: skip
    return y if split == 1 else y.sum(0).to(x.dtype)
