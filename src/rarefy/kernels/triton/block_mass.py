"""What attention gives to each block, without its map: two passes of scores, and no product with values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


@triton.jit
def _scores(
    q, k_base, stride_kn, column, place, keys, low, scale, D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    token, channel = column * BK + tl.arange(0, BK), tl.arange(0, DP)
    at = k_base + token[:, None].to(tl.int64) * stride_kn + channel[None, :]
    k = tl.load(at, mask=(token < keys)[:, None] & (channel < D)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k)) * scale
    seen = ((token < keys) & (token >= low))[None, :] & (place < keys)[:, None]
    if CAUSAL:
        seen = seen & (token[None, :] <= place[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _mass(
    query, key, out, first, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, queries, keys, offset,
    scale, heads, rows, blocks,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    FIRST: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    block, pair = rows - 1 - tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    index, channel = block * BQ + tl.arange(0, BQ), tl.arange(0, DP)
    place, real = index + offset, index < queries
    at = query + row * stride_qb + head * stride_qh + index[:, None].to(tl.int64) * stride_qn + channel[None, :]
    q = tl.load(at, mask=real[:, None] & (channel < D)[None, :], other=0.0)
    k_base = key + row * stride_kb + (head // GROUP) * stride_kh
    low = 0
    if FIRST:
        low = tl.load(first + row).to(tl.int32)
    last = blocks
    if CAUSAL:
        last = tl.minimum(blocks, (block * BQ + BQ - 1 + offset) // BK + 1)
    top = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    for column in range(0, last):
        scores = _scores(q, k_base, stride_kn, column, place, keys, low, scale, D, DP, BK, CAUSAL)
        peak = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.math.exp2(top - safe) + tl.sum(tl.math.exp2(scores - safe[:, None]), 1)
        top = peak
    safe = tl.where(top == float("-inf"), 0.0, top)
    lse = tl.where(real & (total > 0.0), safe + tl.math.log2(tl.where(total > 0.0, total, 1.0)), float("inf"))
    begin = out + ((row * heads + head) * rows + block) * blocks
    for column in range(0, last):
        scores = _scores(q, k_base, stride_kn, column, place, keys, low, scale, D, DP, BK, CAUSAL)
        shares = tl.math.exp2(scores - lse[:, None])
        tl.store(begin + column, tl.max(shares) if MAX else tl.sum(shares))
    for column in range(last, blocks):
        tl.store(begin + column, 0.0)


def block_mass(
    query: Tensor, key: Tensor, *, block_q: int, block_k: int, scaling: float, offset: int, causal: bool = True,
    first: Tensor | None = None, reduce: str = "mass", num_warps: int = 4, num_stages: int = 2,
) -> Tensor:  # fmt: skip
    """Attention probabilities between blocks of ``query [B, H, Q, D]`` and ``key [B, Hkv, L, D]``, float32 ``[B, H,
    query blocks, key blocks]``: their sum (each query counts 1 over its row), or their greatest (``reduce="max"``).
    Query ``i`` is key ``i + offset``; keys before ``first`` int ``[B]`` are padding."""
    batch, heads, queries, channels = query.shape
    rows, blocks = -(-queries // block_q), -(-key.shape[2] // block_k)
    out = torch.empty(batch, heads, rows, blocks, device=query.device)
    _mass[(rows, batch * heads)](
        query, key, out, out if first is None else first, *query.stride()[:3], *key.stride()[:3], queries, key.shape[2],
        offset, scaling * LOG2E, heads, rows, blocks, GROUP=heads // key.shape[1], D=channels,
        DP=max(16, triton.next_power_of_2(channels)), BQ=block_q, BK=block_k, CAUSAL=causal, FIRST=first is not None,
        MAX=reduce == "max", num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out
