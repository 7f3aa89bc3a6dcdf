"""Attention of one query token over keys and values in code (split-KV flash decoding, Dao et al. 2023).

One program takes all query heads of one KV head and one stretch of tokens, and leaves a weighted sum of values with its
log-sum-exp; a second kernel merges stretches. What differs between codecs is how a tile of tokens gets into registers,
which the ``*_KIND`` of each side says:

* ``DENSE``: numbers ``[tokens, D]`` of any float dtype;
* ``CHANNEL`` (keys): uniform codes ``[blocks, D, block]`` with a scale and zero for ``group`` tokens of a channel. The
  scale goes into the query and the zero becomes a number per query, so a key costs one conversion;
* ``TOKEN``: uniform codes ``[tokens, D]`` with a scale and zero for ``group`` channels of a token;
* ``TABLE``: codes ``[tokens, D]`` into a table, times a scale and plus an offset for each token.

Codes are bit streams of ``packing.pack_bits``. Tokens lie in *runs* of equal length, each with its own memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DENSE, CHANNEL, TOKEN, TABLE = 0, 1, 2, 3
KINDS = {"dense": DENSE, "channel": CHANNEL, "token": TOKEN, "table": TABLE}
NUMBERS = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
}  # fmt: skip
ROWS = 16  # the fewest rows that a tensor core multiplies
PROGRAMS = 4 * 132 * 2  # that keep a large GPU busy to the end


@dataclass(frozen=True)
class Tiles:
    """Keys or values of all runs. ``runs``: for each run the tensors of its codes (or numbers), scale and zero (or
    offset), contiguous, ``[B, H, ...]``. ``block``: tokens of a block of ``channel`` codes, ``group``: tokens or
    channels that share a scale. ``lut``: float32 table of ``table`` codes."""

    kind: str
    runs: tuple[tuple[Tensor, ...], ...]
    num_bits: int = 16
    block: int = 1
    group: int = 1
    lut: Tensor | None = None

    def pointers(self, device: torch.device) -> Tensor:
        """Addresses int64 ``[3, runs]``."""
        rows = [[tensor.data_ptr() for tensor in run] + [0] * (3 - len(run)) for run in self.runs]
        return torch.tensor(rows, dtype=torch.int64).T.contiguous().to(device)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr):
    """A pointer to memory that torch allocated, hence aligned."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _codes_at(base, first, ROWS_: tl.constexpr, COLS: tl.constexpr, STRIDE, BITS: tl.constexpr):
    """Codes float16 ``[ROWS_, COLS]`` of a bit stream: row ``r`` starts at code ``first + r * STRIDE``."""
    rows = tl.arange(0, ROWS_).to(tl.int64) * STRIDE + first
    if 32 % BITS == 0:
        PER: tl.constexpr = 32 // BITS
        WORDS: tl.constexpr = COLS // PER
        words = tl.load(base + rows[:, None] // PER + tl.arange(0, WORDS)[None, :])
        shifts = tl.arange(0, PER) * BITS
        codes = (words[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
        return tl.reshape(codes, (ROWS_, COLS)).to(tl.float16)
    else:
        bits = (rows[:, None] + tl.arange(0, COLS)[None, :]) * BITS
        shift = (bits % 32).to(tl.int32)
        over = shift > 32 - BITS
        low = tl.load(base + bits // 32).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        high = tl.load(base + bits // 32 + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
        high = tl.where(over, high << tl.where(over, 32 - shift, 0).to(tl.uint32), 0)
        return ((low | high) & ((1 << BITS) - 1)).to(tl.float16)


@triton.jit
def _token_tile(
    codes, scale, zero, lut, row, N: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Numbers float16 ``[N, D]`` of tokens from ``row`` on, of codes that lie token by token; for a table without the
    token's scale and offset."""
    if KIND == 0:
        place = (row + tl.arange(0, N).to(tl.int64))[:, None] * D + tl.arange(0, D)[None, :]
        return tl.load(_pointer(codes, NUMBERS) + place).to(tl.float16)
    values = _codes_at(_pointer(codes, tl.int32), row * D, N, D, D, BITS)
    if KIND == 3:
        return tl.load(lut + values.to(tl.int32)).to(tl.float16)
    GROUPS: tl.constexpr = D // GROUP
    place = (row + tl.arange(0, N).to(tl.int64))[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    steps = tl.load(_pointer(scale, tl.float16) + place).to(tl.float32)
    zeros = tl.load(_pointer(zero, tl.float16) + place).to(tl.float32)
    wide = tl.reshape(values, (N, GROUPS, GROUP)).to(tl.float32)
    return tl.reshape((wide - zeros[:, :, None]) * steps[:, :, None], (N, D)).to(tl.float16)


@triton.jit
def _split(
    query, k_table, k_lut, v_table, v_lut, sinks, first, part_out, part_lse,
    runs, run_tokens, parts, heads, splits, scaling,
    GROUP_HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, SINKS: tl.constexpr, PADDED: tl.constexpr,
    K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_BLOCK: tl.constexpr, K_GROUP: tl.constexpr,
    V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, K_OFFSET: tl.constexpr,
    V_OFFSET: tl.constexpr, NUMBERS: tl.constexpr, M: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    run, part = split // parts, split % parts
    batch = pair // heads
    k_codes, k_scale, k_zero = tl.load(k_table + run), tl.load(k_table + runs + run), tl.load(k_table + 2 * runs + run)
    v_codes, v_scale, v_zero = tl.load(v_table + run), tl.load(v_table + runs + run), tl.load(v_table + 2 * runs + run)
    member, channel = tl.arange(0, M), tl.arange(0, D)
    real = member < GROUP_HEADS
    place = (pair * GROUP_HEADS + member)[:, None] * D + channel[None, :]
    q = tl.load(query + place, mask=real[:, None], other=0.0).to(tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, D), tl.float32)
    for tile in range(TILES):
        start = (part * TILES + tile) * N
        row = pair * run_tokens + start  # of tensors that lie token by token
        if K_KIND == 1:
            block = pair * (run_tokens // K_BLOCK) + start // K_BLOCK
            within = start % K_BLOCK
            keys = _codes_at(_pointer(k_codes, tl.int32), block * D * K_BLOCK + within, D, N, K_BLOCK, K_BITS)
            group = (block * D + channel) * (K_BLOCK // K_GROUP) + within // K_GROUP
            step = tl.load(_pointer(k_scale, tl.float16) + group).to(tl.float32)
            zero = tl.load(_pointer(k_zero, tl.float16) + group).to(tl.float32)
            # Both terms use the query as rounded here, so a large zero does not magnify its rounding.
            scaled = (q * step[None, :]).to(tl.float16)
            scores = tl.dot(scaled, keys) - tl.sum(scaled.to(tl.float32) * zero[None, :], 1)[:, None]
        else:
            keys = _token_tile(k_codes, k_scale, k_zero, k_lut, row, N, D, K_KIND, K_BITS, K_GROUP, NUMBERS)
            scores = tl.dot(q.to(tl.float16), tl.trans(keys))
            if K_KIND == 3:
                token = row + tl.arange(0, N)
                scores *= tl.load(_pointer(k_scale, tl.float16) + token).to(tl.float32)[None, :]
                if K_OFFSET:
                    offset = tl.load(_pointer(k_zero, tl.float16) + token).to(tl.float32)
                    scores += tl.sum(q, 1)[:, None] * offset[None, :]
        scores *= scaling
        position = run * run_tokens + start + tl.arange(0, N)
        for number in tl.static_range(SINKS):
            hidden = position == tl.load(sinks + batch * SINKS + number)
            scores = tl.where(hidden[None, :], float("-inf"), scores)
        if PADDED:
            scores = tl.where((position < tl.load(first + batch))[None, :], float("-inf"), scores)
        peak = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        shares = tl.exp(scores - safe[:, None])
        fade = tl.exp(top - safe)
        total = total * fade + tl.sum(shares, 1)
        mixed *= fade[:, None]
        values = _token_tile(v_codes, v_scale, v_zero, v_lut, row, N, D, V_KIND, V_BITS, V_GROUP, NUMBERS)
        if V_KIND == 3:
            token = row + tl.arange(0, N)
            weights = shares * tl.load(_pointer(v_scale, tl.float16) + token).to(tl.float32)[None, :]
            mixed += tl.dot(weights.to(tl.float16), values)
            if V_OFFSET:
                offset = tl.load(_pointer(v_zero, tl.float16) + token).to(tl.float32)
                mixed += tl.sum(shares * offset[None, :], 1)[:, None]
        else:
            mixed += tl.dot(shares.to(tl.float16), values)
        top = peak
    sum_ = tl.where(total == 0.0, 1.0, total)
    out = (pair * GROUP_HEADS + member) * splits + split
    tl.store(part_out + out[:, None] * D + channel[None, :], mixed / sum_[:, None], mask=real[:, None])
    tl.store(part_lse + out, tl.where(total == 0.0, float("-inf"), top + tl.log(sum_)), mask=real)


@triton.jit
def _merge(part_out, part_lse, out, lse, splits: tl.constexpr, D: tl.constexpr, S: tl.constexpr):
    head, channel = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    top = tl.full((), float("-inf"), tl.float32)
    for start in range(0, splits, S):
        split = start + tl.arange(0, S)
        own = tl.load(part_lse + head * splits + split, mask=split < splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(own, 0))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((), tl.float32)
    mixed = tl.zeros((D,), tl.float32)
    for start in range(0, splits, S):
        split = start + tl.arange(0, S)
        here = split < splits
        share = tl.exp(tl.load(part_lse + head * splits + split, mask=here, other=float("-inf")) - safe)
        place = (head * splits + split)[:, None] * D + channel[None, :]
        rows = tl.load(part_out + place, mask=here[:, None], other=0.0)
        mixed += tl.sum(rows * share[:, None], 0)
        total += tl.sum(share, 0)
    sum_ = tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * D + channel, mixed / sum_)
    tl.store(lse + head, tl.where(total == 0.0, float("-inf"), safe + tl.log(sum_)))


def fits(keys: Tiles, values: Tiles, channels: int, run_tokens: int) -> bool:
    """Whether the kernel can read these tiles: sizes are powers of two, and rows of codes begin with a word."""
    tile = min(128, keys.group) if keys.kind == "channel" else 64
    sizes = [channels, tile, keys.group, values.group]
    plain = all(size & (size - 1) == 0 for size in sizes) and channels >= 16 and tile >= 16 and run_tokens % tile == 0
    in_code = [side for side in (keys, values) if side.kind != "dense"]
    whole = all((tile if side.kind == "channel" else channels) * side.num_bits % 32 == 0 for side in in_code)
    return plain and whole


class DecodeAttention:
    """Attention over fixed runs of coded keys and values; addresses and workspace are made once, so that a call is two
    launches and can be captured in a CUDA graph."""

    def __init__(
        self, keys: Tiles, values: Tiles, batch: int, heads: int, query_heads: int, channels: int, run_tokens: int, *,
        device: torch.device, parts: int | None = None, sinks: Tensor | None = None, first: Tensor | None = None,
        num_warps: int = 4, num_stages: int = 2,
    ):  # fmt: skip
        """``run_tokens``: tokens of each run. ``parts``: programs for each run and KV head (None: enough to fill the
        GPU). ``sinks`` int64 ``[B, S]``: tokens that are left out; ``first`` int64 ``[B]``: tokens before it are.
        Raises ValueError where sizes do not fit the kernel (see `fits`)."""
        self.tile = min(128, keys.group) if keys.kind == "channel" else 64
        if not fits(keys, values, channels, run_tokens):
            raise ValueError(
                f"{run_tokens} tokens in tiles of {self.tile} by {channels} channels do not fit the kernel."
            )
        self.keys, self.values = keys, values  # whose memory the addresses point to
        runs, tiles = len(keys.runs), run_tokens // self.tile
        if parts is None:
            parts = PROGRAMS // max(1, batch * heads * runs)
        parts = max(count for count in range(1, tiles + 1) if tiles % count == 0 and count <= max(1, parts))
        self.splits = runs * parts
        empty = torch.zeros(1, device=device)
        self.out = torch.empty(batch, query_heads, channels, device=device)
        self.lse = torch.empty(batch, query_heads, device=device)
        self._partial = torch.empty(batch * query_heads, self.splits, channels, device=device)
        self._partial_lse = torch.empty(batch * query_heads, self.splits, device=device)
        self._grid = (batch * heads, self.splits)
        self._tensors = (
            keys.pointers(device), empty if keys.lut is None else keys.lut,
            values.pointers(device), empty if values.lut is None else values.lut,
            empty if sinks is None else sinks, empty if first is None else first,
        )  # fmt: skip
        self._sizes = (runs, run_tokens, parts, heads, self.splits)
        dense = next((run[0].dtype for side in (keys, values) if side.kind == "dense" for run in side.runs), None)
        self._meta: dict[str, Any] = {
            "GROUP_HEADS": query_heads // heads, "D": channels, "N": self.tile,
            "SINKS": 0 if sinks is None else sinks.shape[1], "PADDED": first is not None,
            "K_KIND": KINDS[keys.kind], "K_BITS": keys.num_bits, "K_BLOCK": keys.block, "K_GROUP": keys.group,
            "V_KIND": KINDS[values.kind], "V_BITS": values.num_bits, "V_GROUP": values.group,
            "K_OFFSET": len(keys.runs[0]) > 2, "V_OFFSET": len(values.runs[0]) > 2,
            "NUMBERS": NUMBERS[dense or torch.float16],
            "M": max(ROWS, triton.next_power_of_2(query_heads // heads)),
            "TILES": tiles // parts, "num_warps": num_warps, "num_stages": num_stages,
        }  # fmt: skip

    def __call__(self, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """``query [B, Hq, D]``; the result float32 ``[B, Hq, D]`` and its log-sum-exp ``[B, Hq]``, overwritten by the
        next call."""
        _split[self._grid](
            query.contiguous(), *self._tensors, self._partial, self._partial_lse, *self._sizes, scaling, **self._meta
        )
        heads, channels = self._partial.shape[0], self._partial.shape[2]
        _merge[(heads,)](self._partial, self._partial_lse, self.out, self.lse, self.splits, D=channels, S=32)
        return self.out, self.lse
