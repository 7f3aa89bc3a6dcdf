"""Attention between folded queries and keys, summed in blocks: a matrix product with softmax where it ends.

A row of the operands stands for ``stride`` tokens, so its width is large and its number small; two passes over the keys
take the place of the map, which would be larger than all else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


@triton.jit
def _products(
    q_at, k_base, stride_kn, column, width, scale, keys, key_row, BM: tl.constexpr, BN: tl.constexpr,
    BF: tl.constexpr, rows,
):  # fmt: skip
    inner = tl.arange(0, BF)
    k_at = k_base + (column + tl.arange(0, BN))[:, None].to(tl.int64) * stride_kn + inner[None, :]
    here = (column + tl.arange(0, BN) < keys)[:, None]
    real = (rows < key_row)[:, None]
    scores = tl.zeros((BM, BN), tl.float32)
    for start in range(0, width, BF):
        q = tl.load(q_at + start, mask=real, other=0.0)
        k = tl.load(k_at + start, mask=here, other=0.0)
        scores = tl.dot(q, tl.trans(k), scores)
    return scores * scale


@triton.jit
def _seen(column, last, low, keys, stride, BN: tl.constexpr):
    token = column + tl.arange(0, BN)
    # Of a tile that begins with padding the last token counts.
    return (token[None, :] <= last[:, None]) & ((token < keys) & (token * stride + stride - 1 >= low))[None, :]


@triton.jit
def _folded(
    query, key, out, first, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, queries, keys, width,
    offset, count, scale, heads, rows, blocks, stride,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, PQ: tl.constexpr, PK: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    tile, pair = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    index = tile * BM + tl.arange(0, BM)
    q_at = query + row * stride_qb + head * stride_qh + index[:, None].to(tl.int64) * stride_qn
    q_at += tl.arange(0, BF)[None, :]
    k_base = key + row * stride_kb + (head // GROUP) * stride_kh
    low = 0
    if FIRST:
        low = tl.load(first + row).to(tl.int32)
    # The last token of a row of queries says which rows of keys it sees: those that begin before it.
    last = (tl.minimum(index * stride + stride - 1, count - 1) + offset) // stride
    end = tl.minimum(keys, tl.max(last, 0) + 1)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for column in range(0, end, BN):
        scores = _products(q_at, k_base, stride_kn, column, width, scale, keys, queries, BM, BN, BF, index)
        scores = tl.where(_seen(column, last, low, keys, stride, BN), scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.math.exp2(top - safe) + tl.sum(tl.math.exp2(scores - safe[:, None]), 1)
        top = peak
    safe = tl.where(top == float("-inf"), 0.0, top)
    lse = safe + tl.math.log2(tl.where(total > 0.0, total, 1.0))
    lse = tl.where((index < queries) & (total > 0.0), lse, float("inf"))
    line = tile * (BM // PQ) + tl.arange(0, BM // PQ)
    for column in range(0, end, BN):
        scores = _products(q_at, k_base, stride_kn, column, width, scale, keys, queries, BM, BN, BF, index)
        scores = tl.where(_seen(column, last, low, keys, stride, BN), scores, float("-inf"))
        shares = tl.reshape(tl.math.exp2(scores - lse[:, None]), (BM // PQ, PQ, BN // PK, PK))
        sums = tl.sum(tl.sum(shares, 3), 1)
        block = column // PK + tl.arange(0, BN // PK)
        at = ((row * heads + head) * rows + line)[:, None] * blocks + block[None, :]
        tl.store(out + at, sums, mask=(line < rows)[:, None] & (block < blocks)[None, :])


def folded_mass(
    query: Tensor, key: Tensor, *, stride: int, per_row: int, per_column: int, scaling: float, offset: int, count: int,
    blocks: tuple[int, int], first: Tensor | None = None, tile: int = 128, num_warps: int = 8, num_stages: int = 3,
) -> Tensor:  # fmt: skip
    """Causal attention probabilities of ``query [B, H, n, F]`` over ``key [B, Hkv, m, F]``, summed in blocks of
    ``per_row`` by ``per_column`` rows: float32 ``[B, H, *blocks]``. A row stands for ``stride`` tokens, of ``count``
    queries in all, of which query ``i`` is key ``i + offset``; keys before ``first`` int ``[B]`` are padding."""
    batch, heads, rows, width = query.shape
    out = torch.zeros(batch, heads, *blocks, device=query.device)
    size = max(tile, per_row, per_column)
    _folded[(triton.cdiv(rows, size), batch * heads)](
        query, key, out, out if first is None else first, *query.stride()[:3], *key.stride()[:3], rows, key.shape[2],
        width, offset, count, scaling * LOG2E, heads, *blocks, stride, GROUP=heads // key.shape[1], BM=size, BN=size,
        BF=min(64, width), PQ=per_row, PK=per_column, FIRST=first is not None, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return out
