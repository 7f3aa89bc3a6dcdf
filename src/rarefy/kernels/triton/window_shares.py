"""How much queries look at windows of keys by the windows' means, without a map of it: a pass for each query's sum, and
one that adds up shares over queries and over the heads that share keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
TILE = 64  # windows at once


@triton.jit
def _scores(
    q, base, stride_n, window, number, place, low, scale, size, stride, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Scores of queries with windows, -inf where a query does not see a window whole."""
    channel = tl.arange(0, DP)
    at = base + window[:, None].to(tl.int64) * stride_n + channel[None, :]
    k = tl.load(at, mask=(window < number)[:, None] & (channel < D)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k)) * scale
    begin = window * stride
    seen = ((window < number) & (begin >= low))[None, :] & ((begin + size - 1)[None, :] <= place[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _queries(query, row, head, index, queries, stride_b, stride_h, stride_n, D: tl.constexpr, DP: tl.constexpr):
    channel = tl.arange(0, DP)
    at = query + row * stride_b + head * stride_h + index[:, None].to(tl.int64) * stride_n + channel[None, :]
    return tl.load(at, mask=(index < queries)[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _totals(
    query, means, out, first, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, queries, number,
    offset, scale, more, size, stride, heads,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    block, pair = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    index = block * BQ + tl.arange(0, BQ)
    q = _queries(query, row, head, index, queries, stride_qb, stride_qh, stride_qn, D, DP)
    base = means + row * stride_kb + (head // GROUP) * stride_kh
    low = 0
    if FIRST:
        low = tl.load(first + row).to(tl.int32)
    last = tl.minimum(number, tl.maximum(0, block * BQ + BQ + offset - size + stride) // stride)
    top = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    for begin in range(0, last, BN):
        window = begin + tl.arange(0, BN)
        scores = _scores(q, base, stride_kn, window, number, index + offset, low, scale, size, stride, D, DP)
        peak = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.math.exp2(top - safe) + tl.sum(tl.math.exp2(scores - safe[:, None]), 1)
        top = peak
    some = total > 0.0
    safe = tl.where(top == float("-inf"), 0.0, top)
    found = tl.where(some, safe + tl.math.log2(tl.where(some, total, 1.0)) + more, float("-inf"))
    tl.store(out + (row * heads + head) * queries + index, found, mask=index < queries)


@triton.jit
def _shares(
    query, means, totals, out, first, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, queries, number,
    offset, scale, size, stride, heads, rows,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    block, pair = rows - 1 - tl.program_id(0), tl.program_id(1)
    kv_heads = heads // GROUP
    row, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    within = tl.arange(0, BP)
    index = block * BQ + within
    mine = (within < BQ) & (index < queries)
    base = means + row * stride_kb + kv_head * stride_kh
    low = 0
    if FIRST:
        low = tl.load(first + row).to(tl.int32)
    place = tl.minimum(block * BQ + BQ, queries) - 1 + offset
    last = tl.minimum(number, tl.maximum(0, place + 1 - size + stride) // stride)
    end = out + ((row * kv_heads + kv_head) * rows + block) * number
    for begin in range(0, last, BN):
        window = begin + tl.arange(0, BN)
        added = tl.zeros((BN,), tl.float32)
        for member in range(0, GROUP):
            head = kv_head * GROUP + member
            q = _queries(query, row, head, index, queries, stride_qb, stride_qh, stride_qn, D, DP)
            total = tl.load(totals + (row * heads + head) * queries + index, mask=mine, other=float("inf"))
            total = tl.where(total == float("-inf"), float("inf"), total)
            scores = _scores(q, base, stride_kn, window, number, index + offset, low, scale, size, stride, D, DP)
            added += tl.sum(tl.where(mine[:, None], tl.math.exp2(scores - total[:, None]), 0.0), 0)
        reached = (window < last) & (window * stride >= low)
        tl.store(end + window, tl.where(reached, added, float("-inf")), mask=window < number)
    for begin in range((last + BN - 1) // BN * BN, number, BN):
        window = begin + tl.arange(0, BN)
        tl.store(end + window, tl.full((BN,), float("-inf"), tl.float32), mask=window < number)


def window_totals(
    query: Tensor, means: Tensor, *, size: int, stride: int, scaling: float, offset: int, first: Tensor | None = None,
    more: float = 0.0, num_warps: int = 4, num_stages: int = 3,
) -> Tensor:  # fmt: skip
    """Each query's log-sum-exp (to base 2) over the windows it sees whole, plus ``more``: float32 ``[B, H, Q]``, -inf
    where it sees none. See `window_shares`."""
    batch, heads, queries, channels = query.shape
    out = torch.empty(batch, heads, queries, device=query.device)
    _totals[(triton.cdiv(queries, 128), batch * heads)](
        query, means, out, out if first is None else first, *query.stride()[:3], *means.stride()[:3], queries,
        means.shape[2], offset, scaling * LOG2E, more, size, stride, heads, GROUP=heads // means.shape[1], D=channels,
        DP=max(16, triton.next_power_of_2(channels)), BQ=128, BN=TILE, FIRST=first is not None, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return out


def window_shares(
    query: Tensor, means: Tensor, totals: Tensor, *, block_q: int, size: int, stride: int, scaling: float, offset: int,
    first: Tensor | None = None, num_warps: int = 4, num_stages: int = 3,
) -> Tensor:  # fmt: skip
    """Shares of windows, added up over the queries of a block and the heads that share keys: float32 ``[B, Hkv, query
    blocks, n]``, -inf where no query of a block sees a window whole.

    ``query [B, H, Q, D]``: query ``i`` is key ``i + offset``. ``means [B, Hkv, n, D]``, in its dtype: of keys ``[stride
    * i, stride * i + size)``. ``totals``: from `window_totals`. Keys before ``first`` int ``[B]`` are padding.
    """
    batch, heads, queries, channels = query.shape
    kv_heads, number = means.shape[1:3]
    rows = -(-queries // block_q)
    out = torch.empty(batch, kv_heads, rows, number, device=query.device)
    _shares[(rows, batch * kv_heads)](
        query, means, totals, out, totals if first is None else first, *query.stride()[:3], *means.stride()[:3],
        queries, number, offset, scaling * LOG2E, size, stride, heads, rows, GROUP=heads // kv_heads, D=channels,
        DP=max(16, triton.next_power_of_2(channels)), BQ=block_q, BP=max(16, triton.next_power_of_2(block_q)), BN=TILE,
        FIRST=first is not None, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out
