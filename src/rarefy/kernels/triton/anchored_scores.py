"""Queries against every key in whole numbers, relative to an exact sum over the first and the nearest keys: one number
for each pair of blocks, and no map of scores.

Two small kernels write codes. A query has a scale, and so has a block of keys; both leave the loop of the third one,
which takes the greatest product of each query within a block where it is, in registers. Only then do scales, sums and
queries meet, on one number in ``block_k``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
EXACT = 7  # the largest code that floats serve
# Codes as floats are a quarter of themselves, and a query's scale is at least this share of the mean of queries: so
# sums of products stay within float16, whatever the mean is to them.
QUARTER = tl.constexpr(0.25)
LEAST = tl.constexpr(1 / 128)


@triton.jit
def _rounded(values, scale, kind, FLOATS: tl.constexpr):
    codes = tl.math.floor(values / scale + 0.5)
    return (codes * QUARTER if FLOATS else codes).to(kind)


@triton.jit
def _greatest(mean, channel, inside):
    """The greatest channel of a mean, not zero."""
    return tl.maximum(tl.max(tl.abs(tl.load(mean + channel, mask=inside, other=0.0))), 1e-12)


@triton.jit
def _keys(
    key, key_mean, query_mean, codes, scales, bias, stride_b, stride_h, stride_n, tokens, width, heads, most,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, FLOATS: tl.constexpr,
):  # fmt: skip
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, channel = block * BK + tl.arange(0, BK), tl.arange(0, DP)
    inside = channel < D
    real = (token < tokens)[:, None] & inside[None, :]
    at = key + pair // heads * stride_b + pair % heads * stride_h + token[:, None].to(tl.int64) * stride_n
    mean = tl.load(key_mean + pair * D + channel, mask=inside, other=0.0)
    values = tl.load(at + channel[None, :], mask=real, other=0.0).to(tl.float32)
    values = tl.where(real, values - mean[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.abs(values)), 1e-12) / most
    place = codes + (pair * width + token[:, None]) * DP + channel[None, :]
    tl.store(place, _rounded(values, scale, codes.dtype.element_ty, FLOATS))
    tl.store(scales + pair * (width // BK) + block, scale)
    if BIAS:
        for member in range(GROUP):
            at_mean = query_mean + (pair * GROUP + member) * D
            asked = tl.load(at_mean + channel, mask=inside, other=0.0) / _greatest(at_mean, channel, inside)
            added = tl.sum(values * asked[None, :], 1) / scale
            tl.store(bias + (pair * GROUP + member) * width + token, added)


@triton.jit
def _queries(
    query, key, query_mean, key_mean, codes, scales, shifts, anchors, first, stride_qb, stride_qh, stride_qn, stride_kb,
    stride_kh, stride_kn, queries, tokens, offset, scale, most, sink, local, every, heads,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, FIRST: tl.constexpr, FLOATS: tl.constexpr,
):  # fmt: skip
    block, pair = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, head = pair // heads, pair % heads
    within, channel = tl.arange(0, ROWS), tl.arange(0, DP)
    inside = channel < D
    # The last query of a block and each so many-th before it.
    last = tl.minimum(block * BQ + BQ, queries) - 1
    index = last - (ROWS - 1 - within) * every
    real, place = index >= block * BQ, index + offset
    at = query + row * stride_qb + head * stride_qh + index[:, None].to(tl.int64) * stride_qn + channel[None, :]
    q = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0)
    low = 0
    if FIRST:
        low = tl.load(first + row).to(tl.int32)
    begin = tl.maximum(0, block * BQ + offset - local) // BK * BK
    stop = tl.minimum(tokens, last + 1 + offset)
    base = key + row * stride_kb + head // GROUP * stride_kh + channel[None, :]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    # Sinks and neighbours, side by side; where they meet, keys of both are neighbours.
    sinks = tl.minimum(sink, begin)
    for at_key in range(0, sinks + stop - begin, BN):
        number = at_key + tl.arange(0, BN)
        token = tl.where(number < sinks, number, number - sinks + begin)
        there = (token < stop)[:, None] & inside[None, :]
        k = tl.load(base + token[:, None].to(tl.int64) * stride_kn, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k))
        scores = tl.where((token >= low)[None, :] & (token[None, :] <= place[:, None]), scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 1) * scale)
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.math.exp2(top - safe) + tl.sum(tl.math.exp2(scores * scale - safe[:, None]), 1)
        top = peak
    # Codes are of keys without their mean, which takes as much off every score of a row.
    mean = tl.load(key_mean + (row * (heads // GROUP) + head // GROUP) * D + channel, mask=inside, other=0.0)
    values = q.to(tl.float32)
    shift = tl.sum(values * mean[None, :], 1) * scale
    anchor = tl.where(real & (total > 0.0), top + tl.math.log2(tl.where(total > 0.0, total, 1.0)) - shift, float("inf"))
    asked = tl.load(query_mean + pair * D + channel, mask=inside, other=0.0)
    values = tl.where(real[:, None] & inside[None, :], values - asked[None, :], 0.0)
    middle = _greatest(query_mean + pair * D, channel, inside)
    own = tl.maximum(tl.max(tl.abs(values), 1), middle * LEAST) / most
    out = (pair * tl.num_programs(0) + block) * ROWS + within
    kind: tl.constexpr = codes.dtype.element_ty
    tl.store(codes + out[:, None] * DP + channel[None, :], _rounded(values, own[:, None], kind, FLOATS))
    unit: tl.constexpr = QUARTER * QUARTER if FLOATS else 1.0
    tl.store(scales + out, own / unit)
    tl.store(shifts + out, middle / own * unit)
    tl.store(anchors + out, anchor)


@triton.jit
def _best(
    left, shift, rate, anchor, k_codes, k_scales, bias, at_key, place, low, tokens,
    M: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr, BIAS: tl.constexpr,
    FLOATS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The greatest anchored score of each block of queries in each block of a tile of keys."""
    token = at_key + tl.arange(0, BN)
    right_scale = tl.load(k_scales + at_key // BK + tl.arange(0, BN // BK))
    right = tl.load(k_codes + at_key * DP)
    # Two float16 are added and compared at once.
    if FLOATS:
        product = tl.dot(left, tl.trans(right), out_dtype=tl.float16)
        if BIAS:
            # One channel more, in the fewest that a product has: so no thread loads for itself what comes with keys.
            row = tl.arange(0, 16)
            added = tl.load(bias + token[None, :] + row[:, None] * 0, mask=(row == 0)[:, None], other=0.0)
            product = tl.dot(shift, added, product, out_dtype=tl.float16)
    else:
        product = tl.dot(left, tl.trans(right)).to(tl.float32)
        if BIAS:
            product += tl.load(bias + token)[None, :] * shift[:, None]
    if MASK:
        seen = ((token < tokens) & (token >= low))[None, :] & (token[None, :] <= place[:, None])
        product = tl.where(seen, product, float("-inf"))
    best = tl.max(tl.reshape(product, (M, BN // BK, BK)), 2).to(tl.float32)
    best = best * (rate[:, None] * right_scale[None, :]) - anchor[:, None]
    return tl.max(tl.reshape(best, (M // ROWS, ROWS, BN // BK)), 1)


@triton.jit
def _anchored(
    q_codes, q_scales, q_shifts, anchors, k_codes, k_scales, bias, out, first, queries, tokens, width, offset, scale,
    every, heads, lines, blocks,
    GROUP: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, M: tl.constexpr,
    BN: tl.constexpr, BIAS: tl.constexpr, FLOATS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    tile, pair = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, head = pair // heads, pair % heads
    kv_head = row * (heads // GROUP) + head // GROUP
    PER: tl.constexpr = M // ROWS
    line, within = tile * PER + tl.arange(0, M) // ROWS, tl.arange(0, M) % ROWS
    place = tl.minimum(line * BQ + BQ, queries) - 1 - (ROWS - 1 - within) * every + offset
    at = (pair * tl.num_programs(0) + tile) * M + tl.arange(0, M)
    left = tl.load(q_codes + at[:, None] * DP + tl.arange(0, DP)[None, :])
    shift, rate = tl.load(q_shifts + at), tl.load(q_scales + at) * scale
    anchor = tl.load(anchors + at) * 0.6931471805599453
    if FLOATS:
        shift = tl.where((tl.arange(0, 16) == 0)[None, :], shift[:, None], 0.0).to(tl.float16)
    right = k_codes + kv_head * width * DP + tl.arange(0, BN)[:, None] * DP + tl.arange(0, DP)[None, :]
    right_scales, added = k_scales + kv_head * (width // BK), bias + pair * width
    low = 0
    if FIRST:
        low = tl.load(first + row).to(tl.int32)
    # Tiles of keys: those that every query of the tile sees, and at both ends those that some do.
    stop = tl.minimum(tokens, tile * PER * BQ + PER * BQ + offset)
    begin, whole = low // BN * BN, (tile * PER * BQ + offset + 1) // BN * BN
    plain = (low + BN - 1) // BN * BN
    rest = tl.maximum(whole, plain)
    early = (plain - begin) // BN
    lines_at = out + (pair * lines + tile * PER + tl.arange(0, PER)[:, None]) * blocks
    column, real = tl.arange(0, BN // BK)[None, :], (tile * PER + tl.arange(0, PER) < lines)[:, None]
    for at_key in range(plain, whole, BN):
        best = _best(
            left, shift, rate, anchor, right, right_scales, added, at_key, place, low, tokens, M, ROWS, BN, BK, DP,
            BIAS, FLOATS, False,
        )  # fmt: skip
        tl.store(lines_at + at_key // BK + column, best, mask=real)
    for number in range(0, early + tl.maximum(0, (stop - rest + BN - 1) // BN)):
        at_key = tl.where(number < early, begin, rest + (number - early) * BN)
        if at_key < stop:
            best = _best(
                left, shift, rate, anchor, right, right_scales, added, at_key, place, low, tokens, M, ROWS, BN, BK, DP,
                BIAS, FLOATS, True,
            )  # fmt: skip
            tl.store(lines_at + at_key // BK + column, best, mask=real & (at_key // BK + column < blocks))


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one product, and how a program that takes it is built: with at most ``registers`` for each
    thread (None: as many as it likes), so that two programs fit where one would wait for its products alone."""

    rows: int = 128
    keys: int = 128
    num_warps: int = 8
    num_stages: int = 3
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """How its kernel is launched."""
        own = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return own if self.registers is None else {**own, "maxnreg": self.registers}


OF_FLOATS, OF_INTEGERS = Tile(rows=256, registers=128), Tile()


def code_type(most: int, device: torch.device) -> torch.dtype:
    """The type of codes up to ``most``: whole numbers, or floats that hold them, where their products need no
    conversion."""
    floats = device.type == "cuda" and most <= EXACT and torch.cuda.get_device_capability(device)[0] == 9
    return torch.float8_e4m3fn if floats else torch.int8


def key_codes(
    key: Tensor, key_mean: Tensor, query_mean: Tensor | None, *, most: int, block_k: int, width: int,
    dtype: torch.dtype = torch.int8, num_warps: int = 4,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``key [B, Hkv, L, D]`` beyond ``key_mean`` float32 ``[B, Hkv, D]`` as whole numbers up to ``most`` either way,
    ``dtype`` ``[B, Hkv, width, D']`` with zeros behind (a quarter of them where it is a float's); a scale for each
    block, float32 ``[B, Hkv, width / block_k]``; and what ``query_mean`` float32 ``[B, H, D]`` times them is, over that
    scale and its own greatest channel, ``[B, H, width]`` in what products are added up in: float32, or float16 beside
    floats (None: nothing; the scales are returned again)."""
    batch, heads, tokens, channels = key.shape
    codes = torch.empty(batch, heads, width, max(32, triton.next_power_of_2(channels)), dtype=dtype, device=key.device)
    scales = torch.empty(batch, heads, width // block_k, device=key.device)
    group = 1 if query_mean is None else query_mean.shape[1] // heads
    kind = torch.float16 if dtype.is_floating_point else torch.float32
    bias = scales if query_mean is None else torch.empty(batch, heads * group, width, dtype=kind, device=key.device)
    _keys[(width // block_k, batch * heads)](
        key, key_mean.contiguous(), key_mean if query_mean is None else query_mean.contiguous(), codes, scales, bias,
        *key.stride()[:3], tokens, width, heads, most, GROUP=group, D=channels, DP=codes.shape[3], BK=block_k,
        BIAS=query_mean is not None, FLOATS=dtype.is_floating_point, num_warps=num_warps,
    )  # fmt: skip
    return codes, scales, bias


def query_codes(
    query: Tensor, key: Tensor, query_mean: Tensor, key_mean: Tensor, *, most: int, block_q: int, block_k: int,
    rows: int, lines: int, every: int, sink: int, local: int, scaling: float, offset: int, first: Tensor | None = None,
    dtype: torch.dtype = torch.int8, keys: int = 64, num_warps: int = 4, num_stages: int = 2,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of each block of ``query [B, H, Q, D]`` the ``rows`` that are looked at, beyond ``query_mean`` float32 ``[B, H,
    D]``: codes as in `key_codes` ``[B, H, lines * rows, D']``, and float32 ``[B, H, lines * rows]`` the scale of a
    product with codes of keys, what their third tensor is multiplied by, and anchors (the log-sum-exp to base 2 of the
    exact scores of sinks and neighbours, with keys beyond ``key_mean``; inf where there is none)."""
    batch, heads, queries, channels = query.shape
    wide = max(32, triton.next_power_of_2(channels))
    codes = torch.empty(batch, heads, lines * rows, wide, dtype=dtype, device=query.device)
    scales, shifts, anchors = torch.empty(3, batch, heads, lines * rows, device=query.device).unbind()
    _queries[(lines, batch * heads)](
        query, key, query_mean.contiguous(), key_mean.contiguous(), codes, scales, shifts, anchors,
        anchors if first is None else first, *query.stride()[:3], *key.stride()[:3], queries, key.shape[2], offset,
        scaling * LOG2E, most, sink, local, every, heads, GROUP=heads // key.shape[1], D=channels, DP=wide, ROWS=rows,
        BQ=block_q, BK=block_k, BN=keys, FIRST=first is not None, FLOATS=dtype.is_floating_point, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return codes, scales, shifts, anchors


def anchored_scores(
    query: Tensor, key: Tensor, query_mean: Tensor | None, key_mean: Tensor, *, most: int, block_q: int, block_k: int,
    sink: int, local: int, scaling: float, offset: int, every: int = 1, first: Tensor | None = None,
    tile: Tile | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The logarithm of the largest share that a query of one block seems to give a key of the other, by codes up to
    ``most`` either way, relative to the exact sum over the first ``sink`` keys and those from ``local`` before its
    block on: float32 ``[B, H, query blocks, key blocks]``, -inf out of reach.

    ``query [B, H, Q, D]``: query ``i`` is key ``i + offset``; of each block the last and each ``every``-th before it
    are looked at, a power of two of at least 16 in all. ``key [B, Hkv, L, D]``; ``block_k`` likewise. What is rounded
    are queries beyond ``query_mean`` float32 ``[B, H, D]`` (None: as they are) and keys beyond ``key_mean`` ``[B, Hkv,
    D]``. Keys before ``first`` int ``[B]`` are padding.
    """
    dtype = dtype or code_type(most, query.device)
    tile = tile or (OF_FLOATS if dtype.is_floating_point else OF_INTEGERS)
    batch, heads, queries, channels = query.shape
    tokens = key.shape[2]
    rows, many, keys = -(-block_q // every), -(-queries // block_q), max(tile.keys, block_k)
    size = max(tile.rows, rows)
    lines, width = triton.cdiv(many, size // rows) * (size // rows), triton.cdiv(tokens, keys) * keys
    moved = query_mean if query_mean is not None else torch.zeros(batch, heads, channels, device=query.device)
    asked = query_codes(
        query, key, moved, key_mean, most=most, block_q=block_q, block_k=block_k, rows=rows, lines=lines, every=every,
        sink=sink, local=local, scaling=scaling, offset=offset, first=first, dtype=dtype,
    )  # fmt: skip
    kept = key_codes(key, key_mean, query_mean, most=most, block_k=block_k, width=width, dtype=dtype)
    out = torch.full((batch, heads, many, -(-tokens // block_k)), -torch.inf, device=query.device)
    _anchored[(lines * rows // size, batch * heads)](
        *asked, *kept, out, out if first is None else first, queries, tokens, width, offset, scaling, every,
        heads, many, out.shape[3], GROUP=heads // key.shape[1], DP=asked[0].shape[3], ROWS=rows, BQ=block_q,
        BK=block_k, M=size, BN=keys, BIAS=query_mean is not None, FLOATS=dtype.is_floating_point,
        FIRST=first is not None, **tile.options(),
    )  # fmt: skip
    return out
