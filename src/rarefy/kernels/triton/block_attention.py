"""Attention of many queries over listed blocks of keys (FlashAttention, Dao 2023, over compressed sparse rows).

One program takes one block of queries, of one head or of several that share its list, and walks the list: first blocks
that are seen as a whole, without a mask, then those whose tokens have to be masked. Large blocks of keys are taken in
parts. Tensors are read where they lie; only channels must be contiguous. From Hopper on a copy engine fetches keys and
values of 16 bits part by part, which spares threads their addresses.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634
QUERIES, KEYS = 128, 64  # the most of a tile: what 4 warps hold


@triton.jit
def _tile(
    q, key, value, stride_kn, stride_vn, column, place, row, kv_head, keys, window, low, high, own, segment, scale,
    mixed, top, total,
    D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ENGINE: tl.constexpr,
):  # fmt: skip
    """One block of keys joins the running sum. ``place``: keys that the queries are."""
    token, channel = column * BK + tl.arange(0, BK), tl.arange(0, DP)
    # A load ahead of the loop may read behind the list's end, where anything may be; and a block's last parts may lie
    # behind all keys.
    begin = tl.minimum(tl.maximum(column, 0), (keys - 1) // BK) * BK
    if ENGINE:
        k = key.load([row.to(tl.int32), kv_head.to(tl.int32), begin, 0]).reshape(BK, DP)
        v = value.load([row.to(tl.int32), kv_head.to(tl.int32), begin, 0]).reshape(BK, DP)
    else:
        place_at = (begin + tl.arange(0, BK))[:, None].to(tl.int64)
        k_at = key + place_at * stride_kn + channel[None, :]
        v_at = value + place_at * stride_vn + channel[None, :]
        if MASKED:
            here = (token < keys)[:, None] & (channel < D)[None, :]
            k, v = tl.load(k_at, mask=here, other=0.0), tl.load(v_at, mask=here, other=0.0)
        elif D == DP:
            k, v = tl.load(k_at), tl.load(v_at)
        else:
            k = tl.load(k_at, mask=(channel < D)[None, :], other=0.0)
            v = tl.load(v_at, mask=(channel < D)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        seen = (token >= low) & (token < high)
        both = seen[None, :] & (place < keys)[:, None]
        if CAUSAL:
            both = both & (token[None, :] <= place[:, None])
        if WINDOW:
            both = both & (token[None, :] > place[:, None] - window)
        if SEGMENT:
            theirs = tl.load(segment + row * keys + token, mask=token < keys, other=-2)
            both = both & (theirs[None, :] == own[:, None])
        scores = tl.where(both, scores, float("-inf"))
    # The scale, which is positive, waits until it is one operation with the difference.
    peak = tl.maximum(top, tl.max(scores, 1) * scale)
    safe = tl.where(peak == float("-inf"), 0.0, peak) if MASKED else peak
    shares = tl.math.exp2(scores * scale - safe[:, None])
    fade = tl.math.exp2(top - safe)
    total = total * fade + tl.sum(shares, 1)
    mixed = mixed * fade[:, None]
    mixed = tl.dot(shares.to(v.dtype), v, mixed)
    return mixed, peak, total


@triton.jit
def _attend(
    query, key, value, out, lse, start, whole, count, columns, first, stop, segment,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, queries, keys, offset, window, scale, heads, rows, block_q,
    GROUP: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr, STOP: tl.constexpr,
    SEGMENT: tl.constexpr, ENGINE: tl.constexpr, PACK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Later rows see more and come first, so that the last programs are short ones.
    pair, block = tl.program_id(1), rows - 1 - tl.program_id(0)
    row, lead = (pair // (heads // PACK)).to(tl.int64), (pair % (heads // PACK) * PACK).to(tl.int64)
    line = (row * (heads // SHARED) + lead // SHARED) * rows + block
    within, channel = tl.arange(0, BQ) % (BQ // PACK), tl.arange(0, DP)
    head, index = lead + tl.arange(0, BQ) // (BQ // PACK), block * block_q + within
    place = index + offset
    real = (within < block_q) & (index < queries)
    inside = real[:, None] & (channel < D)[None, :]
    q_at = query + row * stride_qb + head[:, None] * stride_qh + index[:, None].to(tl.int64) * stride_qn
    q = tl.load(q_at + channel[None, :], mask=inside, other=0.0)
    kv_head = lead // GROUP
    if not ENGINE:
        key, value = key + row * stride_kb + kv_head * stride_kh, value + row * stride_vb + kv_head * stride_vh
    low, high = 0, keys
    if FIRST:
        low = tl.load(first + row).to(tl.int32)
    if STOP:
        high = tl.load(stop + row).to(tl.int32)
    own = place
    if SEGMENT:
        own = tl.load(segment + row * keys + place, mask=(place >= 0) & (place < keys), other=-1).to(tl.int32)
    begin = columns + tl.load(start + line).to(tl.int64)
    full, entries = tl.load(whole + line), tl.load(count + line)
    top = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    mixed = tl.zeros((BQ, DP), tl.float32)
    for entry in range(0, full * PARTS):
        column = tl.load(begin + entry // PARTS) * PARTS + entry % PARTS
        mixed, top, total = _tile(
            q, key, value, stride_kn, stride_vn, column, place, row, kv_head, keys, window, low, high, own, segment,
            scale, mixed, top, total, D, DP, BK, False, CAUSAL, WINDOW, SEGMENT, ENGINE,
        )  # fmt: skip
    for entry in range(full * PARTS, entries * PARTS):
        column = tl.load(begin + entry // PARTS) * PARTS + entry % PARTS
        mixed, top, total = _tile(
            q, key, value, stride_kn, stride_vn, column, place, row, kv_head, keys, window, low, high, own, segment,
            scale, mixed, top, total, D, DP, BK, True, CAUSAL, WINDOW, SEGMENT, ENGINE,
        )  # fmt: skip
    sum_ = tl.where(total == 0.0, 1.0, total)
    out_at = out + row * stride_ob + head[:, None] * stride_oh + index[:, None].to(tl.int64) * stride_on
    tl.store(out_at + channel[None, :], (mixed / sum_[:, None]).to(out.dtype.element_ty), mask=inside)
    # A sum that is NaN has to show, so only a sum of nothing is minus infinity.
    log_sum = tl.where(total == 0.0, float("-inf"), (top + tl.math.log2(sum_)) * 0.6931471805599453)
    tl.store(lse + (row * heads + head) * queries + index, log_sum, mask=real)


@functools.cache
def has_engine(device: torch.device) -> bool:
    """Whether blocks of tensors are fetched by a copy engine."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def described(x: Tensor, block_k: int) -> TensorDescriptor | None:
    """``x [B, H, L, D]`` as the copy engine is told of it; None where there is none, or ``x`` does not lie as it asks:
    each row of channels at a multiple of 16 bytes."""
    strides = [stride if size > 1 else 8 for size, stride in zip(x.shape, x.stride()[:3], strict=False)]
    fits = x.element_size() == 2 and x.data_ptr() % 16 == 0 and all(stride and stride % 8 == 0 for stride in strides)
    if not fits or not has_engine(x.device):
        return None
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block_k, triton.next_power_of_2(x.shape[3])])


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, whole: Tensor, count: Tensor, columns: Tensor, *,
    block_q: int, block_k: int, scaling: float, offset: int, causal: bool, window: int | None = None,
    first: Tensor | None = None, stop: Tensor | None = None, segment: Tensor | None = None,
    num_warps: int = 4, num_stages: int = 2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of ``query [B, H, Q, D]`` over the listed blocks of ``key``, ``value [B, Hkv, L, D]``.

    ``start``, ``whole``, ``count`` int32 ``[B, M, query blocks]`` and ``columns`` int32 as in a block map, with M a
    divisor of H; ``first``, ``stop`` int ``[B]`` and ``segment`` int ``[B, L]`` as in its reach; ``scaling`` is above
    zero. The result lies as ``[B, Q, H, D]`` and is returned as ``[B, H, Q, D]``, with the log-sum-exp float32 ``[B, H,
    Q]``.
    """
    batch, heads, queries, channels = query.shape
    rows = count.shape[2]
    out = torch.empty(batch, queries, heads, channels, dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    group, shared = heads // key.shape[1], heads // count.shape[1]
    wide, part = triton.next_power_of_2(block_q), min(block_k, KEYS)
    pack = math.gcd(group, shared, max(1, QUERIES // wide))
    both = [described(x, part) for x in (key, value)]
    engine = None not in both
    meta: dict[str, Any] = {
        "GROUP": group, "SHARED": shared, "D": channels, "DP": max(16, triton.next_power_of_2(channels)),
        "BQ": max(16, pack * wide), "BK": part, "CAUSAL": causal, "WINDOW": window is not None,
        "FIRST": first is not None, "STOP": stop is not None, "SEGMENT": segment is not None, "ENGINE": engine,
        "PACK": pack, "PARTS": block_k // part, "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip
    none = lse
    _attend[rows, batch * heads // pack](
        query, *(both if engine else (key, value)), out, lse, start, whole, count, columns,
        none if first is None else first, none if stop is None else stop, none if segment is None else segment,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        queries, key.shape[2], offset, window or 0, scaling * LOG2E, heads, rows, block_q, **meta,
    )  # fmt: skip
    return out, lse
