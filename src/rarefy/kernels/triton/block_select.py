"""Choice of blocks on the device: one program turns a row of scores into a list, without sorting and without a wait.

The cut of a rule is found digit by digit: floats that are not negative order as their bits do, so a few counts over a
row give the least score that is kept. Blocks with that very score are taken from the first one on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOP, MASS, CUT = 0, 1, 2
LEAST = tl.constexpr(-1e30)  # below every score
RULES = {"top": TOP, "mass": MASS, "cut": CUT}


@triton.jit
def write_list(
    x, flag, limits, columns, start, whole, count, line, head, blocks, share, wanted, least,
    RULE: tl.constexpr, NORMALIZED: tl.constexpr, BY_HEAD: tl.constexpr, ON_TOP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The list of line ``line``, by its scores ``x [N]`` and their flags."""
    block = tl.arange(0, N)
    some = x > float("-inf")
    always = some & ((x == float("inf")) | ((flag & 4) != 0))
    shares = x
    if RULE == 1 or NORMALIZED:
        finite = some & (x < float("inf"))
        known = tl.where(finite, x, float("-inf"))
        peak = tl.max(known, 0)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        parts = tl.exp(known - peak)
        all_parts = tl.sum(parts, 0)
        shares = parts / tl.where(all_parts == 0.0, 1.0, all_parts)
    if RULE == 0:
        need = wanted
        if share > 0:
            need = tl.ceil(tl.sum(flag & 1, 0).to(tl.float32) * share - 1e-6).to(tl.int32)
        need = tl.maximum(need, least)
        free = some
        if ON_TOP:
            free = some & (always == 0)
        # What is not free has the order of no float but one NaN, 0.
        bits = tl.where(always, float("inf"), x).to(tl.uint32, bitcast=True)
        order = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)
        order = tl.where(free, order, 0)
        cut = tl.zeros((), tl.uint32)
        # Two bits a step: three counts are one sum.
        COUNTS: tl.constexpr = tl.uint32 if N <= 512 else tl.uint64
        WIDTH: tl.constexpr = 10 if N <= 512 else 20
        MOST: tl.constexpr = (1 << WIDTH) - 1
        for step in tl.static_range(16):
            unit = tl.full((), 1, tl.uint32) << (30 - 2 * step)
            one, two = (order >= cut + unit).to(COUNTS), (order >= cut + 2 * unit).to(COUNTS)
            three = (order >= cut + 3 * unit).to(COUNTS)
            found = tl.sum(one + (two << WIDTH) + (three << (2 * WIDTH)), 0)
            digit = ((found & MOST).to(tl.int32) >= need).to(tl.uint32)
            digit += (((found >> WIDTH) & MOST).to(tl.int32) >= need).to(tl.uint32)
            digit += ((found >> (2 * WIDTH)).to(tl.int32) >= need).to(tl.uint32)
            cut += digit * unit
        above, equal = order > cut, (order == cut) & free
        rest = need - tl.sum(above.to(tl.int32), 0)
        keep = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= rest))
    elif RULE == 1:
        bits = shares.to(tl.int32, bitcast=True)
        forced_share = tl.sum(tl.where(always, shares, 0.0), 0)
        bits = tl.where(always, 0, bits)
        cut = tl.zeros((), tl.int32)
        for step in tl.static_range(31):
            trial = cut + (1 << (30 - step))
            reached = forced_share + tl.sum(tl.where(bits >= trial, shares, 0.0), 0)
            cut = tl.where(reached >= share, trial, cut)
        above, equal = bits > cut, bits == cut
        have = forced_share + tl.sum(tl.where(above, shares, 0.0), 0)
        least_share = cut.to(tl.float32, bitcast=True)
        before = tl.cumsum(equal.to(tl.int32), 0) - 1
        keep = (above | (equal & (have + before.to(tl.float32) * least_share < share))) & (shares > 0.0)
    else:
        limit = tl.zeros((), tl.float32) + share
        if BY_HEAD:
            limit = tl.load(limits + head)
        keep = tl.where(limit <= 0.0, (flag & 1) != 0, shares > limit if NORMALIZED else x > tl.log(limit))
    keep = (keep | always) & ((flag & 1) != 0)
    seen_whole = keep & ((flag & 2) != 0)
    partial = keep & (seen_whole == 0)
    wholes, partials = seen_whole.to(tl.int32), partial.to(tl.int32)
    first = tl.sum(wholes, 0)
    begin = columns + line * blocks
    tl.store(begin + tl.cumsum(wholes, 0) - 1, block, mask=seen_whole)
    tl.store(begin + first + tl.cumsum(partials, 0) - 1, block, mask=partial)
    tl.store(start + line, (line * blocks).to(tl.int32))
    tl.store(whole + line, first)
    tl.store(count + line, first + tl.sum(partials, 0))


@triton.jit
def _select(
    scores, flags, limits, columns, start, whole, count, heads, rows, blocks, stride_fb, stride_fh, stride_fr,
    share, wanted, least,
    RULE: tl.constexpr, NORMALIZED: tl.constexpr, BY_HEAD: tl.constexpr, ON_TOP: tl.constexpr, FLAGS: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, N)
    here = block < blocks
    x = tl.load(scores + line * blocks + block, mask=here, other=float("-inf"))
    row, head, place = line // (rows * heads), (line // rows) % heads, line % rows
    flag = tl.where(x > float("-inf"), 3, 0)
    if FLAGS:
        at = row * stride_fb + head * stride_fh + place * stride_fr
        flag = tl.load(flags + at + block, mask=here, other=0).to(tl.int32)
        # A block that is kept in any case may have no score.
        x = tl.where((flag & 1) != 0, tl.where((flag & 4) != 0, tl.maximum(x, LEAST), x), float("-inf"))
    write_list(
        x, flag, limits, columns, start, whole, count, line, head, blocks, share, wanted, least, RULE, NORMALIZED,
        BY_HEAD, ON_TOP, N,
    )  # fmt: skip


def select_blocks(
    scores: Tensor, flags: Tensor | None = None, *, rule: str = "top", share: float = 0.0, wanted: int = 0,
    least: int = 1, limits: Tensor | None = None, normalized: bool = True, include_forced: bool = True,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, num_warps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Lists of the blocks that a rule keeps of ``scores`` float32 ``[B, M, rows, blocks]``: ``start``, ``whole``,
    ``count`` int32 ``[B, M, rows]`` and ``columns`` int32, as in a block map.

    ``flags`` uint8, broadcast to ``scores``: bit 0 where a block is in reach, 1 where it needs no mask (such blocks
    come first in a list), 2 where it is kept in any case (None: all whose score is not ``-inf`` are in reach and need
    no mask). Blocks of score ``inf`` are kept too; those of ``-inf`` only where they are in any case. ``rule``: ``top``
    keeps the best ``share`` of blocks in reach (or ``wanted`` of them), at least ``least``, with forced ones among them
    or on top (``include_forced``); ``mass`` the fewest whose softmax reaches ``share``, forced ones first; ``cut``
    those whose softmax (``normalized``; or whose ``exp``) exceeds ``share``, or ``limits`` float32 ``[M]``.
    """
    batch, heads, rows, blocks = scores.shape
    if out is None:
        lines = torch.empty(3, batch, heads, rows, dtype=torch.int32, device=scores.device)
        out = (*lines.unbind(), torch.empty(scores.numel(), dtype=torch.int32, device=scores.device))  # type: ignore[assignment]
    assert out is not None
    start, whole, count, columns = out
    wide = scores if flags is None else flags.expand(scores.shape)
    size = max(16, triton.next_power_of_2(blocks))
    _select[(batch * heads * rows,)](
        scores.contiguous(), wide, scores if limits is None else limits, columns, start, whole, count, heads, rows,
        blocks, *wide.stride()[:3], share, wanted, least, RULE=RULES[rule], NORMALIZED=normalized and rule == "cut",
        BY_HEAD=limits is not None, ON_TOP=not include_forced, FLAGS=flags is not None, N=size,
        num_warps=num_warps or max(1, min(8, size // 512)),
    )  # fmt: skip
    return out


@triton.jit
def _partial(start, whole, count, columns, out, number, lines, WIDTH: tl.constexpr, N: tl.constexpr):
    line = tl.program_id(0) * N + tl.arange(0, N)
    here = line < lines
    first = tl.load(whole + line, mask=here, other=0)
    rest = tl.load(count + line, mask=here, other=0) - first
    tl.store(number + line, rest, mask=here)
    begin = columns + tl.load(start + line, mask=here, other=0) + first
    for place in tl.static_range(WIDTH):
        column = tl.load(begin + place, mask=here & (place < rest), other=0)
        tl.store(out + line * WIDTH + place, column, mask=here)


def partial_blocks(
    start: Tensor, whole: Tensor, count: Tensor, columns: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """How many blocks of every row of a block map have to be masked token by token, int32 ``[B, M, rows]``, and the
    first ``width`` of them, int32 ``[B, M, rows, width]``, 0 where there are fewer."""
    out = torch.empty(*count.shape, width, dtype=torch.int32, device=count.device)
    number = torch.empty_like(count)
    _partial[(triton.cdiv(count.numel(), 128),)](
        start, whole, count, columns, out, number, count.numel(), WIDTH=width, N=128, num_warps=4
    )
    return number, out
