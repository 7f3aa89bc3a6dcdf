"""How much queries look at windows of keys by the windows' means, without a map of it: a pass for each query's sum, and
one that adds up shares over queries and over the heads that share keys.

The second pass has windows as rows and the queries of all these heads as columns of its products, so that what is added
up lies within a thread.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
MOST = 256  # queries of all heads at once


@triton.jit
def _queries(row, queries, block, every, ROWS: tl.constexpr):
    """Queries that rows stand for: of each block of them the last and each so many-th before it; -1 for none."""
    first = row // ROWS * block
    index = tl.minimum(first + block, queries) - 1 - (ROWS - 1 - row % ROWS) * every
    return tl.where((index >= first) & (first < queries), index, -1)


@triton.jit
def _sum(
    q, base, stride_n, number, place, low, scale, size, stride, whole, stop, D: tl.constexpr, DP: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of queries over the windows that they see whole, -inf where there is none. Of windows before
    ``whole`` all queries see all, and after ``stop`` none any."""
    channel = tl.arange(0, DP)
    top = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    for begin in range(0, stop, BN):
        window = begin + tl.arange(0, BN)
        at = base + window[:, None].to(tl.int64) * stride_n + channel[None, :]
        k = tl.load(at, mask=(window < number)[:, None] & (channel < D)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        if begin + BN > whole:
            start = window * stride
            seen = ((window < number) & (start >= low))[None, :] & ((start + size - 1)[None, :] <= place[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.math.exp2(top - safe) + tl.sum(tl.math.exp2(scores - safe[:, None]), 1)
        top = peak
    return tl.where(total > 0.0, top + tl.math.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))


@triton.jit
def _totals(
    query, means, coarse, out, first, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_cb,
    stride_ch, stride_cn, queries, number, coarse_number, offset, scale, more, size, stride, coarse_size,
    coarse_stride, heads, block, every, lines,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    FIRST: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    tile, pair = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, head = pair // heads, pair % heads
    taken, channel = tile * BQ + tl.arange(0, BQ), tl.arange(0, DP)
    index = _queries(taken, queries, block, every, ROWS)
    real, place = index >= 0, index + offset
    at = query + row * stride_qb + head * stride_qh + index[:, None].to(tl.int64) * stride_qn + channel[None, :]
    q = tl.load(at, mask=real[:, None] & (channel < D)[None, :], other=0.0)
    low = 0
    if FIRST:
        low = tl.load(first + row).to(tl.int32)
    kv_head = head // GROUP
    least, most = tl.min(tl.where(real, place, 0x7FFFFFFF)), tl.max(tl.where(real, place, -1))
    found = tl.full((BQ,), float("-inf"), tl.float32)
    if COARSE:
        stop = tl.minimum(coarse_number, tl.maximum(0, most + 1 - coarse_size + coarse_stride) // coarse_stride)
        whole = 0 if FIRST else tl.maximum(0, least + 1 - coarse_size + coarse_stride) // coarse_stride
        base = coarse + row * stride_cb + kv_head * stride_ch
        found = more + _sum(
            q, base, stride_cn, coarse_number, place, low, scale, coarse_size, coarse_stride, whole, stop, D, DP, BQ,
            BN,
        )  # fmt: skip
    # The first queries see no long window yet.
    if tl.max((real & (found == float("-inf"))).to(tl.int32)) > 0:
        stop = tl.minimum(number, tl.maximum(0, most + 1 - size + stride) // stride)
        whole = 0 if FIRST else tl.maximum(0, least + 1 - size + stride) // stride
        base = means + row * stride_kb + kv_head * stride_kh
        short = _sum(q, base, stride_kn, number, place, low, scale, size, stride, whole, stop, D, DP, BQ, BN)
        found = tl.where(found == float("-inf"), short, found)
    found = tl.where(real & (found > float("-inf")), found, float("inf"))
    tl.store(out + pair * lines * ROWS + taken, found, mask=taken < lines * ROWS)


@triton.jit
def _shares(
    query, means, totals, out, first, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, queries, number,
    offset, scale, size, stride, kv_heads, block, every, lines,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    BP: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    line, pair = lines - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, kv_head = pair // kv_heads, pair % kv_heads
    channel, within, member = tl.arange(0, DP), tl.arange(0, BR) % BP, tl.arange(0, BR) // BP
    index = tl.where(within < ROWS, _queries(line * ROWS + within, queries, block, every, ROWS), -1)
    place = index + offset
    base = means + row * stride_kb + kv_head * stride_kh + channel[None, :]
    low = 0
    if FIRST:
        low = tl.load(first + row).to(tl.int32)
    last = tl.minimum(line * block + block, queries) - 1 + offset
    stop = tl.minimum(number, tl.maximum(0, last + 1 - size + stride) // stride)
    whole = 0 if FIRST else tl.maximum(0, line * block + offset + 1 - size + stride) // stride
    end = out + (pair * lines + line) * number
    for chunk in tl.static_range(0, GROUP, MEMBERS):
        mine = (index >= 0) & (member < MEMBERS) & (chunk + member < GROUP)
        head = kv_head * GROUP + chunk + member
        at = query + row * stride_qb + head[:, None] * stride_qh + index[:, None].to(tl.int64) * stride_qn
        q = tl.load(at + channel[None, :], mask=mine[:, None] & (channel < D)[None, :], other=0.0)
        at_total = ((row * kv_heads * GROUP + head) * lines + line) * ROWS + within
        total = tl.load(totals + at_total, mask=mine, other=float("inf"))
        for begin in range(0, stop, BN):
            window = begin + tl.arange(0, BN)
            there = (window < number)[:, None] & (channel < D)[None, :]
            k = tl.load(base + window[:, None].to(tl.int64) * stride_kn, mask=there, other=0.0)
            scores = tl.dot(k, tl.trans(q)) * scale - total[None, :]
            if begin + BN > whole:
                start = window * stride
                seen = (start + size - 1)[:, None] <= place[None, :]
                scores = tl.where(seen & (start >= low)[:, None], scores, float("-inf"))
            added = tl.sum(tl.math.exp2(scores), 1)
            if chunk > 0:
                added += tl.load(end + window, mask=window < stop, other=0.0)
            tl.store(end + window, tl.where(window * stride >= low, added, float("-inf")), mask=window < stop)
        # What is added to next may have been written by another thread.
        tl.debug_barrier()
    for begin in range(stop, number, BN):
        window = begin + tl.arange(0, BN)
        tl.store(end + window, tl.full((BN,), float("-inf"), tl.float32), mask=window < number)


@triton.jit
def _blocks(shares, out, number, blocks, before, PER: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr):
    line, block = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    best = tl.zeros((BN,), tl.float32)
    for place in tl.static_range(SPAN):
        window = block * PER - before + place
        share = tl.load(shares + line * number + window, mask=(window >= 0) & (window < number), other=0.0)
        best = tl.maximum(best, share)
    tl.store(out + line * blocks + block, tl.math.log2(best) * 0.6931471805599453, mask=block < blocks)


def block_scores(shares: Tensor, blocks: int, *, size: int, stride: int, block_k: int) -> Tensor:
    """The logarithm of the largest of ``shares [..., n]`` of windows that touch a block, float32 ``[..., blocks]``;
    -inf where none does or has any. ``stride`` divides ``size`` and ``block_k``."""
    lines, number = shares.numel() // shares.shape[-1], shares.shape[-1]
    out = torch.empty(*shares.shape[:-1], blocks, device=shares.device)
    before, per = size // stride - 1, block_k // stride
    tile = min(256, triton.next_power_of_2(blocks))
    _blocks[(lines, triton.cdiv(blocks, tile))](
        shares, out, number, blocks, before, PER=per, SPAN=per + before, BN=tile, num_warps=2
    )
    return out


def window_totals(
    query: Tensor, means: Tensor, coarse: Tensor | None = None, *, size: int, stride: int, scaling: float, offset: int,
    block_q: int, coarse_size: int = 0, coarse_stride: int = 0, every: int = 1, first: Tensor | None = None,
    tile: int = 128, windows: int = 64, num_warps: int = 4, num_stages: int = 2,
) -> Tensor:  # fmt: skip
    """The log-sum-exp (to base 2) over the windows that a query sees whole, of those that are looked at: float32 ``[B,
    H, query blocks * rows]``, inf where there is none or no query. See `window_shares`.

    With ``coarse [B, Hkv, n', D]``, means of longer windows, sums are taken of those, of which each stands for as many
    short ones as its stride holds; where a query sees none of them, of the short ones.
    """
    batch, heads, queries, channels = query.shape
    rows, lines = -(-block_q // every), -(-queries // block_q)
    out = torch.empty(batch, heads, lines * rows, device=query.device)
    wide = means if coarse is None else coarse
    _totals[(triton.cdiv(lines * rows, tile), batch * heads)](
        query, means, wide, out, out if first is None else first, *query.stride()[:3], *means.stride()[:3],
        *wide.stride()[:3], queries, means.shape[2], wide.shape[2], offset, scaling * LOG2E,
        math.log2(coarse_stride / stride) if coarse_stride else 0.0, size, stride, coarse_size, max(1, coarse_stride),
        heads, block_q, every, lines, GROUP=heads // means.shape[1], D=channels,
        DP=max(16, triton.next_power_of_2(channels)), ROWS=rows, BQ=tile, BN=windows, FIRST=first is not None,
        COARSE=coarse is not None, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def window_shares(
    query: Tensor, means: Tensor, totals: Tensor, *, block_q: int, size: int, stride: int, scaling: float, offset: int,
    every: int = 1, first: Tensor | None = None, windows: int = 64, num_warps: int = 4, num_stages: int = 3,
) -> Tensor:  # fmt: skip
    """Shares of windows, added up over the queries of a block that are looked at (the last and each ``every``-th before
    it) and the heads that share keys: float32 ``[B, Hkv, query blocks, n]``, -inf where no query of a block sees a
    window whole.

    ``query [B, H, Q, D]``: query ``i`` is key ``i + offset``. ``means [B, Hkv, n, D]``, in its dtype: of keys ``[stride
    * i, stride * i + size)``. ``totals``: from `window_totals`. Keys before ``first`` int ``[B]`` are padding.
    """
    batch, heads, queries, channels = query.shape
    kv_heads, number = means.shape[1:3]
    group, rows, lines = heads // kv_heads, -(-block_q // every), -(-queries // block_q)
    wide = triton.next_power_of_2(rows)
    members = max(1, min(triton.next_power_of_2(group), MOST // wide))
    out = torch.empty(batch, kv_heads, lines, number, device=query.device)
    _shares[(lines, batch * kv_heads)](
        query, means, totals, out, out if first is None else first, *query.stride()[:3], *means.stride()[:3], queries,
        number, offset, scaling * LOG2E, size, stride, kv_heads, block_q, every, lines, GROUP=group, MEMBERS=members,
        D=channels, DP=max(16, triton.next_power_of_2(channels)), ROWS=rows, BP=wide, BR=max(16, members * wide),
        BN=windows, FIRST=first is not None, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out
