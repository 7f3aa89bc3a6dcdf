"""Every query against every key in whole numbers, relative to an exact sum over the first and the nearest keys: one
number for each pair of blocks, and no map of scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


@triton.jit
def _codes(
    x, mean, codes, scales, stride_b, stride_h, stride_n, tokens, heads, most,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    block, pair = tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    token, channel = block * BN + tl.arange(0, BN), tl.arange(0, DP)
    real = (token < tokens)[:, None] & (channel < D)[None, :]
    at = x + row * stride_b + head * stride_h + token[:, None].to(tl.int64) * stride_n + channel[None, :]
    middle = tl.load(mean + (row * heads + head) * D + channel, mask=channel < D, other=0.0)
    values = tl.load(at, mask=real, other=0.0).to(tl.float32)
    values = tl.where(real, values - middle[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.abs(values), 1), 1e-12) / most
    rounded = tl.math.floor(values / scale[:, None] + 0.5)
    out = (row * heads + head) * tokens + token
    tl.store(codes + out[:, None] * D + channel[None, :], rounded.to(tl.int8), mask=real)
    tl.store(scales + out, scale, mask=token < tokens)


@triton.jit
def _exact(
    q, key, base, token, place, tokens, begin, sink, low, scale, stride_kn, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Exact scores of queries with keys that are their sinks or neighbours; -inf for others."""
    channel = tl.arange(0, DP)
    at = base + token[:, None].to(tl.int64) * stride_kn + channel[None, :]
    k = tl.load(key + at, mask=(token < tokens)[:, None] & (channel < D)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k)) * scale
    near = ((token < sink) | (token >= begin)) & (token < tokens) & (token >= low)
    return tl.where(near[None, :] & (token[None, :] <= place[:, None]), scores, float("-inf"))


@triton.jit
def _anchored(
    query, key, key_mean, q_codes, q_scales, k_codes, k_scales, bias, out, first, stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn, queries, tokens, offset, scale, sink, local, heads, rows, blocks,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    block, pair = rows - 1 - tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    kv_head = row * (heads // GROUP) + head // GROUP
    index, channel = block * BQ + tl.arange(0, BQ), tl.arange(0, DP)
    place, real = index + offset, index < queries
    inside = channel < D
    at = query + row * stride_qb + head * stride_qh + index[:, None].to(tl.int64) * stride_qn + channel[None, :]
    q = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0)
    low = 0
    if FIRST:
        low = tl.load(first + row).to(tl.int32)
    begin = tl.maximum(0, block * BQ + offset - local) // BK * BK
    stop = tl.minimum(tokens, block * BQ + BQ + offset)
    base = row * stride_kb + (head // GROUP) * stride_kh
    top = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    # Sinks, then neighbours; where they meet, keys of both are neighbours.
    for part in tl.static_range(2):
        start = 0 if part == 0 else begin
        end = tl.minimum(sink, begin) if part == 0 else stop
        for at_key in range(start, end, BN):
            token = at_key + tl.arange(0, BN)
            scores = _exact(q, key, base, token, place, end, begin, sink, low, scale, stride_kn, D, DP)
            peak = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(peak == float("-inf"), 0.0, peak)
            total = total * tl.math.exp2(top - safe) + tl.sum(tl.math.exp2(scores - safe[:, None]), 1)
            top = peak
    some = real & (total > 0.0)
    # Codes are of keys without their mean, which takes as much off every score of a row.
    mean = tl.load(key_mean + kv_head * D + channel, mask=inside, other=0.0)
    shift = tl.sum(q.to(tl.float32) * mean[None, :], 1) * scale
    anchor = tl.where(some, top + tl.math.log2(tl.where(some, total, 1.0)) - shift, float("inf"))
    q_at = (row * heads + head) * queries + index
    left = tl.load(q_codes + q_at[:, None] * D + channel[None, :], mask=real[:, None] & inside[None, :], other=0)
    left_scale = tl.load(q_scales + q_at, mask=real, other=0.0) * scale
    result = out + ((row * heads + head) * rows + block) * blocks
    for at_key in range(0, stop, BN):
        token = at_key + tl.arange(0, BN)
        there = token < tokens
        k_at = kv_head * tokens + token
        right = tl.load(k_codes + k_at[None, :] * D + channel[:, None], mask=there[None, :] & inside[:, None], other=0)
        right_scale = tl.load(k_scales + k_at, mask=there, other=0.0)
        added = tl.load(bias + (row * heads + head) * tokens + token, mask=there, other=0.0) * scale
        product = tl.dot(left, right, out_dtype=tl.int32).to(tl.float32)
        scores = product * left_scale[:, None] * right_scale[None, :] + added[None, :] - anchor[:, None]
        seen = (there & (token >= low))[None, :] & (token[None, :] <= place[:, None])
        best = tl.max(tl.where(seen, scores, float("-inf")), 0)
        column = at_key // BK + tl.arange(0, BN // BK)
        tl.store(result + column, tl.max(tl.reshape(best, (BN // BK, BK)), 1), mask=column < blocks)
    for column in range((stop + BN - 1) // BN * (BN // BK), blocks):
        tl.store(result + column, float("-inf"))


def token_codes(x: Tensor, mean: Tensor, most: int, *, num_warps: int = 4) -> tuple[Tensor, Tensor]:
    """``x - mean`` (``x [B, H, T, D]``, ``mean`` float32 ``[B, H, D]``) as whole numbers up to ``most`` either way,
    int8, with a scale for each token, float32 ``[B, H, T]``."""
    batch, heads, tokens, channels = x.shape
    codes = torch.empty(batch, heads, tokens, channels, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch, heads, tokens, device=x.device)
    _codes[(triton.cdiv(tokens, 64), batch * heads)](
        x, mean.contiguous(), codes, scales, *x.stride()[:3], tokens, heads, most, D=channels,
        DP=triton.next_power_of_2(channels), BN=64, num_warps=num_warps,
    )  # fmt: skip
    return codes, scales


def anchored_scores(
    query: Tensor, key: Tensor, key_mean: Tensor, query_codes: tuple[Tensor, Tensor], key_codes: tuple[Tensor, Tensor],
    bias: Tensor, *, block_q: int, block_k: int, sink: int, local: int, scaling: float, offset: int,
    first: Tensor | None = None, tile: int = 64, num_warps: int = 4, num_stages: int = 3,
) -> Tensor:  # fmt: skip
    """The logarithm (to base 2) of the largest share that a query of one block seems to give a key of the other, by
    codes and ``bias`` float32 ``[B, H, L]``, relative to the exact sum over the first ``sink`` keys and those from
    ``local`` before its block on: float32 ``[B, H, query blocks, key blocks]``, -inf out of reach.

    ``query [B, H, Q, D]``: query ``i`` is key ``i + offset``; ``key [B, Hkv, L, D]``; codes from `token_codes`, those
    of keys of what they are beyond ``key_mean`` float32 ``[B, Hkv, D]``. Keys before ``first`` int ``[B]`` are padding.
    """
    batch, heads, queries, channels = query.shape
    tokens = key.shape[2]
    rows, blocks = -(-queries // block_q), -(-tokens // block_k)
    out = torch.empty(batch, heads, rows, blocks, device=query.device)
    _anchored[(rows, batch * heads)](
        query, key, key_mean.contiguous(), *query_codes, *key_codes, bias.contiguous(), out,
        out if first is None else first, *query.stride()[:3], *key.stride()[:3], queries, tokens, offset,
        scaling * LOG2E, sink, local, heads, rows, blocks, GROUP=heads // key.shape[1], D=channels,
        DP=max(32, triton.next_power_of_2(channels)), BQ=block_q, BK=block_k, BN=max(tile, block_k),
        FIRST=first is not None, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out
