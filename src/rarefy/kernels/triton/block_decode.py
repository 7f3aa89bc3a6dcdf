"""Decoding over listed blocks: their choice by what is kept of them, and attention of one query over the chosen.

Nothing here waits for the device or depends on sizes that only it knows, so that a step can be a CUDA graph: lists have
a fixed capacity, lengths are tensors, and the work is split over the list and not over the context.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.kernels.triton.block_select import write_list
from rarefy.kernels.triton.decode_attention import NUMBERS
from rarefy.kernels.triton.step import begin as begin_launch
from rarefy.kernels.triton.step import launch

ROWS = 16  # the fewest rows that a tensor core multiplies
COLUMNS = 8  # the fewest columns that it does
TILE = 64  # blocks that one program gives scores to
MERGED = 8192  # numbers that are merged at once


@triton.jit(do_not_specialize=["kept", "blocks"])
def _choose(
    query, high, low, length, first, scores, columns, start, whole, count, arrived, stride_sb, stride_sh, stride_sn,
    kept, blocks, heads, sink, local, scaling, share, wanted, least,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr, TOKENS: tl.constexpr,
    BOUND: tl.constexpr, FIRST: tl.constexpr, ON_TOP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin_launch(EARLY)
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = pair // heads, pair % heads
    member, channel = tl.arange(0, M), tl.arange(0, D)
    block = part * N + tl.arange(0, N)
    place = (pair * GROUP + member)[:, None] * D + channel[None, :]
    q = tl.load(query + place, mask=(member < GROUP)[:, None], other=0.0)
    at = row * stride_sb + head * stride_sh + block[:, None].to(tl.int64) * stride_sn + channel[None, :]
    tokens = tl.load(length + row)
    last = (tokens - 1) // TOKENS
    # What is kept of a block that has not ended yet need not exist.
    here = (block < tl.minimum(last, kept))[:, None]
    above = tl.load(high + at, mask=here, other=0.0)
    if BOUND:
        below = tl.load(low + at, mask=here, other=0.0)
        positive = tl.where(q > 0, q, 0.0).to(above.dtype)
        negative = tl.where(q < 0, q, 0.0).to(above.dtype)
        products = tl.dot(positive, tl.trans(above)) + tl.dot(negative, tl.trans(below))
    else:
        products = tl.dot(q.to(above.dtype), tl.trans(above))
    products = tl.where((member < GROUP)[:, None], products, float("-inf"))
    best = tl.max(products, 0) * scaling
    padding = 0
    if FIRST:
        padding = tl.load(first + row).to(tl.int32)
    begin = padding // TOKENS
    always = (block < begin + sink) | (block > last - local)
    best = tl.where(always, float("inf"), best)
    best = tl.where((block > last) | (block < begin), float("-inf"), best)
    tl.store(scores + pair * blocks + block, best, mask=block < blocks)
    tl.debug_barrier()  # so that all of the program's scores are written when it is counted
    if tl.atomic_add(arrived + pair, 1) < tl.num_programs(1) - 1:
        return
    tl.store(arrived + pair, 0)  # the last one chooses, and leaves the counter as it was
    tl.debug_barrier()
    every = tl.arange(0, ALL)
    x = tl.load(scores + pair * blocks + every, mask=every < blocks, other=float("-inf"), cache_modifier=".cg")
    entire = (every * TOKENS >= padding) & ((every + 1) * TOKENS <= tokens)
    flag = tl.where(x > float("-inf"), tl.where(entire, 3, 1), 0)
    write_list(
        x, flag, scores, columns, start, whole, count, pair, 0, blocks, share, wanted, least, 0,
        False, False, ON_TOP, ALL,
    )  # fmt: skip


def choose_blocks(
    query: Tensor, high: Tensor, length: Tensor, blocks: int, *, tokens: int, scaling: float, share: float = 0.0,
    wanted: int = 0, least: int = 1, include_forced: bool = True, low: Tensor | None = None,
    first: Tensor | None = None, sink: int = 1, local: int = 1, tile: int = TILE, num_warps: int = 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The best of ``blocks`` blocks of ``tokens`` keys for ``query [B, H, D]``, in one launch: lists as `select_blocks`
    makes them by its rule ``top``, of one row of queries, ``start``, ``whole``, ``count`` int32 ``[B, Hkv, 1]`` and
    ``columns`` int32.

    ``high [B, Hkv, N, D]``: one key for each of the first N blocks, such as the mean, whose product with the best of a
    group's queries is the score; with ``low`` they are the greatest and least number of each channel, and the score is
    the most that a key between them could have. ``length`` int32 ``[B]``: tokens there are; ``first`` int64 ``[B]``:
    those before it are padding. The first ``sink`` and last ``local`` blocks in reach are forced; the others need a key
    each, but for the last. Blocks with tokens from outside of that reach need a mask. ``tile``: blocks that a program
    gives scores to. The first call for so many heads makes a counter, which later ones share: a CUDA graph has to be
    captured after it, and calls must not overlap.
    """
    batch, heads, kept, channels = high.shape
    group, device = query.shape[1] // heads, query.device
    scores = torch.empty(batch, heads, blocks, device=device)
    start, whole, count = torch.empty(3, batch, heads, 1, dtype=torch.int32, device=device).unbind()
    columns = torch.empty(scores.numel(), dtype=torch.int32, device=device)
    launch(
        _choose, (batch * heads, -(-blocks // tile)), device, query.contiguous(), high,
        high if low is None else low, length, length if first is None else first, scores, columns, start, whole, count,
        _counter(batch * heads, device), *high.stride()[:3], kept, blocks, heads, sink, local, scaling, share, wanted,
        least, GROUP=group, D=channels, M=max(ROWS, _power(group)), N=tile, ALL=max(16, _power(blocks)),
        TOKENS=tokens, BOUND=low is not None, FIRST=first is not None, ON_TOP=not include_forced, num_warps=num_warps,
    )  # fmt: skip
    return start, whole, count, columns


def _power(n: int) -> int:
    """The least power of two from ``n`` on; Triton's own takes longer than all else that a launch is told."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=8)
def _counter(pairs: int, device: torch.device) -> Tensor:
    """Zeros, which programs that count themselves leave as they were."""
    return torch.zeros(pairs, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Paged:
    """Keys or values that lie in pages. ``table`` int64 ``[3, pages]``: where each page of ``page`` tokens begins (an
    address), and how far rows of the batch and heads lie apart in it; ``tail [B, Hkv, t, D]``: tokens after those."""

    table: Tensor
    tail: Tensor
    page: int

    @property
    def places(self) -> tuple[int, int, int]:
        return self.tail.data_ptr(), self.tail.stride(0), self.tail.stride(1)


@triton.jit
def _block_of(index, tile, tiles, last, TILES: tl.constexpr):
    """The listed block that a tile is of; any that exists behind the list's end."""
    return tl.minimum(tl.maximum(tl.load(index + tile // TILES, mask=tile < tiles, other=0), 0), last)


@triton.jit
def _address(
    table, tail, tail_row, tail_head, pages, row, head, token, D: tl.constexpr, PAGE: tl.constexpr,
    NUMBERS: tl.constexpr,
):  # fmt: skip
    """Where the tile of tokens from ``token`` on, which lies in one page or in the tail, begins, as a number."""
    page = token // PAGE
    put_away = page < pages
    step = row * tl.load(table + pages + page, mask=put_away, other=tail_row)
    step += head * tl.load(table + 2 * pages + page, mask=put_away, other=tail_head)
    step += (token - tl.minimum(page, pages) * PAGE) * D
    return tl.load(table + page, mask=put_away, other=tail) + step * (NUMBERS.primitive_bitwidth // 8)


@triton.jit(do_not_specialize=["pages"])
def _chosen(
    query, key, value, index, count, first, length, part_out, part_lse, out, lse, arrived,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, pages, heads, capacity, splits, scaling,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr,
    PAGE: tl.constexpr, NUMBERS: tl.constexpr, MERGED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Heads are the columns of all products, so that it is not keys and values that need padding."""
    begin_launch(EARLY)
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = pair // heads, pair % heads
    member, channel = tl.arange(0, M), tl.arange(0, D)
    real = member < GROUP
    q = tl.load(query + (pair * GROUP + member)[None, :] * D + channel[:, None], mask=real[None, :], other=0.0)
    TILES: tl.constexpr = BK // N
    tiles = tl.load(count + pair) * TILES
    each = (tiles + splits - 1) // splits
    tokens, begin = tl.load(length + row), 0
    if FIRST:
        begin = tl.load(first + row).to(tl.int32)
    unit = scaling * 1.4426950408889634  # scores are in units of log 2
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((D, M), tl.float32)
    # Where a tile lies is looked up while the one before is read: these lookups depend on each other, and would have to
    # be waited for. (A value that is handed on unchanged from turn to turn would keep Triton from reading ahead.)
    listed, last = index + pair * capacity, (tokens - 1) // BK
    first_tile = split * each
    at = _block_of(listed, first_tile, tiles, last, TILES) * BK + (first_tile % TILES) * N
    following = _block_of(listed, first_tile + 1, tiles, last, TILES)
    k_address, v_address = row, row
    if PAGE:
        # Strides are then those of the tails, with where they begin in the place of a token's.
        k_address = _address(key, stride_kn, stride_kb, stride_kh, pages, row, head, at, D, PAGE, NUMBERS)
        v_address = _address(value, stride_vn, stride_vb, stride_vh, pages, row, head, at, D, PAGE, NUMBERS)
    for tile in range(first_tile, tl.minimum(tiles, (split + 1) * each)):
        token = at + tl.arange(0, N)
        here = (token < tokens) & (token >= begin)
        if PAGE:
            within = tl.arange(0, N)[:, None] * D + channel[None, :]
            # Memory of torch's is aligned, and so are rows of 16 channels or more.
            k_at = tl.multiple_of(k_address.to(tl.pointer_type(NUMBERS)), 16) + within
            v_at = tl.multiple_of(v_address.to(tl.pointer_type(NUMBERS)), 16) + within
        else:
            wide = token[:, None].to(tl.int64)
            k_at = key + row * stride_kb + head * stride_kh + wide * stride_kn + channel[None, :]
            v_at = value + row * stride_vb + head * stride_vh + wide * stride_vn + channel[None, :]
        k = tl.load(k_at, mask=here[:, None], other=0.0)
        v = tl.load(v_at, mask=here[:, None], other=0.0)
        at = following * BK + ((tile + 1) % TILES) * N
        following = _block_of(listed, tile + 2, tiles, last, TILES)
        if PAGE:
            k_address = _address(key, stride_kn, stride_kb, stride_kh, pages, row, head, at, D, PAGE, NUMBERS)
            v_address = _address(value, stride_vn, stride_vb, stride_vh, pages, row, head, at, D, PAGE, NUMBERS)
        scores = tl.where(here[:, None], tl.dot(k, q) * unit, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 0))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        shares, fade = tl.exp2(scores - safe[None, :]), tl.exp2(top - safe)
        total = total * fade + tl.sum(shares, 0)
        mixed = tl.dot(tl.trans(v), shares.to(v.dtype), mixed * fade[None, :])
        top = peak
    sum_ = tl.where(total == 0.0, 1.0, total)
    mixed = mixed / sum_[None, :]
    log_sum = tl.where(total == 0.0, float("-inf"), (top + tl.log2(sum_)) * 0.6931471805599453)
    own = pair * GROUP + member
    if MERGED == 0:
        tl.store(out + own[None, :] * D + channel[:, None], mixed, mask=real[None, :])
        tl.store(lse + own, log_sum, mask=real)
    else:
        at = own * splits + split
        tl.store(part_out + at[None, :] * D + channel[:, None], mixed, mask=real[None, :])
        tl.store(part_lse + at, log_sum, mask=real)
        tl.debug_barrier()  # so that all of the program's numbers are written when it is counted
        if tl.atomic_add(arrived + pair, 1) < splits - 1:
            return
        tl.store(arrived + pair, 0)  # the last one merges, and leaves the counter as it was
        tl.debug_barrier()
        top = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        merged = tl.zeros((M, D), tl.float32)
        for lowest in range(0, splits, MERGED):
            number = lowest + tl.arange(0, MERGED)
            there = real[:, None] & (number < splits)[None, :]
            place = own[:, None] * splits + number[None, :]
            sums = tl.load(part_lse + place, mask=there, other=float("-inf"), cache_modifier=".cg")
            parts = tl.load(
                part_out + place[:, :, None] * D + channel[None, None, :], mask=there[:, :, None], other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            peak = tl.maximum(top, tl.max(sums, 1))
            safe = tl.where(peak == float("-inf"), 0.0, peak)
            share, fade = tl.exp(sums - safe[:, None]), tl.exp(top - safe)
            merged = merged * fade[:, None] + tl.sum(parts * share[:, :, None], 1)
            total = total * fade + tl.sum(share, 1)
            top = peak
        sum_ = tl.where(total == 0.0, 1.0, total)
        tl.store(out + own[:, None] * D + channel[None, :], merged / sum_[:, None], mask=real[:, None])
        tl.store(lse + own, tl.where(total == 0.0, float("-inf"), top + tl.log(sum_)), mask=real)


class BlockDecode:
    """Attention of one query over chosen blocks of a cache. The workspace is made once, so that a call is one launch
    and can be captured in a CUDA graph; calls must not overlap."""

    def __init__(
        self, batch: int, heads: int, query_heads: int, channels: int, block_k: int, *, device: torch.device,
        splits: int | None = None, tile: int = 64, num_warps: int = 4, num_stages: int | None = None,
    ):  # fmt: skip
        """``splits``: programs for each KV head (None: enough to fill the GPU four times). ``num_stages``: None: three
        over pages, and two over other caches, where more programs at once are worth more than a tile read ahead."""
        self.splits = splits or max(1, min(64, 4 * 132 // (batch * heads)))
        self._partial = torch.empty(batch * query_heads, self.splits, channels, device=device)
        self._partial_lse = torch.empty(batch * query_heads, self.splits, device=device)
        self._arrived = torch.zeros(batch, heads, dtype=torch.int32, device=device)
        group = query_heads // heads
        columns = max(COLUMNS, triton.next_power_of_2(group))
        self._meta: dict[str, Any] = {
            "GROUP": group, "D": channels, "M": columns, "BK": block_k, "N": min(tile, block_k),
            "MERGED": 0 if self.splits == 1 else max(1, min(8, MERGED // (columns * channels))),
            "num_warps": num_warps,
        }  # fmt: skip
        self._stages = num_stages

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, count: Tensor, length: Tensor, scaling: float,
        first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``query [B, H, D]`` over ``key``, ``value [B, Hkv, L, D]`` of which ``length`` int32 ``[B]`` tokens are
        there, at blocks ``index`` int32 ``[B, Hkv, capacity]``, the first ``count`` int32 ``[B, Hkv]`` of them. The
        result ``[B, H, D]`` in the query's dtype and its log-sum-exp float32 ``[B, H]``."""
        strides = (*key.stride()[:3], *value.stride()[:3])
        return self._run(query, key, value, index, count, length, scaling, first, strides)

    def paged(
        self, query: Tensor, key: Paged, value: Paged, index: Tensor, count: Tensor, length: Tensor, scaling: float,
        first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The same where tokens lie in pages, in the query's dtype. Raises ValueError where a tile does not fit
        them."""
        if key.page != value.page or key.page % self._meta["N"]:
            raise ValueError(f"Tiles of {self._meta['N']} tokens do not divide pages of {key.page} and {value.page}.")
        (k, k_row, k_head), (v, v_row, v_head) = key.places, value.places
        strides, pages = (k_row, k_head, k, v_row, v_head, v), key.table.shape[1]
        return self._run(query, key.table, value.table, index, count, length, scaling, first, strides, key.page, pages)

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, count: Tensor, length: Tensor, scaling: float,
        first: Tensor | None, strides: tuple[int, ...], page: int = 0, pages: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, heads = index.shape[:2]
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(query.shape[:2], device=query.device)
        launch(
            _chosen, (batch * heads, self.splits), query.device, query.contiguous(), key, value, index, count,
            count if first is None else first, length, self._partial, self._partial_lse, out, lse, self._arrived,
            *strides, pages, heads, index.shape[-1], self.splits, scaling, FIRST=first is not None,
            PAGE=page, NUMBERS=NUMBERS[query.dtype], num_stages=self._stages or (3 if page else 2), **self._meta,
        )  # fmt: skip
        return out, lse
