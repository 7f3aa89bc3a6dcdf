"""Attention of one query token over keys and values in code (split-KV flash decoding, Dao et al. 2023).

One program takes all query heads of one KV head and one stretch of tokens, and leaves a weighted sum of values with its
log-sum-exp; a second kernel merges stretches. What differs between codecs is how codes become numbers, which the
``*_KIND`` of each side says:

* ``DENSE``: numbers ``[tokens, D]`` of any float dtype;
* ``CHANNEL`` (keys): uniform codes ``[blocks, D, block]`` with a scale and zero for ``group`` tokens of a channel;
* ``TOKEN``: uniform codes ``[tokens, D]`` with a scale and zero for ``group`` channels of a token;
* ``TABLE``: codes ``[tokens, D]`` into a table, times a scale and plus an offset for each token.

Codes are bit streams of ``packing.pack_bits``. They are read in *chunks* of a few codes, and the codes at one *slot* of
all chunks of a tile are one operand of a tensor-core product: heads are its columns, so that it is the codes that need
no padding, and no code ever changes its lane. A uniform code becomes the float16 ``1 + code / 2 ** bits`` by two bit
operations for two codes; scales and zeros go into the query, the weights and the sums. Tokens lie in *runs* of equal
length, each with its own memory.
"""

# ruff: noqa: RUF005 - tuples in Triton know addition only

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

DENSE, CHANNEL, TOKEN, TABLE = 0, 1, 2, 3
KINDS = {"dense": DENSE, "channel": CHANNEL, "token": TOKEN, "table": TABLE}
NUMBERS = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
}  # fmt: skip
HEADS = 8  # the fewest columns that a tensor core multiplies
DEPTH = 16  # the fewest numbers of a product that it adds up
PROGRAMS = 132 * 8 * 2  # that keep a large GPU busy to the end


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

    def chunk(self, channels: int) -> int:
        """Codes of a chunk: 8, or fewer where their bits are not loaded at once or a row of ``channels`` has fewer
        chunks than a product adds up; 0 where nothing fits."""
        if self.kind == "dense":
            return 1
        most = 32 // self.num_bits if self.num_bits != 3 else 8
        if self.kind != "channel":
            most = min(most, channels // DEPTH)
        return next((per for per in (8, 4, 2) if per <= most and per * self.num_bits in (8, 16, 24, 32)), 0)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr):
    """A pointer to memory that torch allocated, hence aligned."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _chunks(address, base, inner, phase, shifts, BITS: tl.constexpr, PER: tl.constexpr):
    """Chunks ``base + inner`` of a stream, each of ``PER`` codes in the low bits of an integer. ``phase``: the number
    of a chunk among the four that fill three words, where codes have 3 bits."""
    WIDTH: tl.constexpr = BITS * PER
    if WIDTH == 32:
        return tl.load(_pointer(address, tl.int32) + base + inner)
    elif WIDTH == 16:
        return tl.load(_pointer(address, tl.int16) + base + inner)
    elif WIDTH == 8:
        return tl.load(_pointer(address, tl.int8) + base + inner).to(tl.int32)
    else:
        words = _pointer(address, tl.int32) + base // 4 * 3
        # Shifts are loaded, since numbers that a program computes would not move to where products want them.
        shift = tl.load(shifts + phase)
        low = tl.load(words + inner * 3 // 4).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        high = tl.load(words + (inner * 3 + 2) // 4) << 1
        return low.to(tl.int32, bitcast=True) | (high << (31 - shift))


@triton.constexpr_function
def _two_halves(slot: int, bits: int, width: int) -> str:
    """Instructions that make two float16 ``1 + code / 2 ** bits`` of the codes at ``slot`` of two chunks."""
    up = 10 - bits
    place = slot * bits
    mask = ((1 << bits) - 1) << up
    if width == 16:
        words = "mov.b32 t, $1;"
    else:
        words = f"prmt.b32 t, $1, $2, {0x5410 if place + bits <= 16 else 0x7632};"
        place %= 16
    move = f"shr.b32 t, t, {place - up};" if place > up else f"shl.b32 t, t, {up - place};"
    return f"{{ .reg .b32 t; {words} {move} lop3.b32 $0, t, {mask << 16 | mask}, {0x3C003C00}, 0xea; }}"


@triton.jit
def _halves(chunks, SLOT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    """float16 ``1 + code / 2 ** BITS`` of the codes at ``SLOT``; ``PAIRS``: two at once, with instructions of a GPU."""
    STRADDLES: tl.constexpr = WIDTH != 16 and (SLOT * BITS) // 16 != ((SLOT + 1) * BITS - 1) // 16
    if PAIRS and not STRADDLES:
        if WIDTH == 16:
            return tl.inline_asm_elementwise(
                _two_halves(SLOT, BITS, WIDTH), "=r,r", [chunks], dtype=tl.float16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                _two_halves(SLOT, BITS, WIDTH), "=r,r,r", [chunks], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        up = _codes(chunks, SLOT, BITS) << (10 - BITS)
        return (up | 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _codes(chunks, SLOT: tl.constexpr, BITS: tl.constexpr):
    return (chunks.to(tl.int32) >> (SLOT * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _numbers(chunks, lut, SLOT: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr,
             PAIRS: tl.constexpr):  # fmt: skip
    """float16 of the codes at ``SLOT``, without their scales."""
    if KIND == 0:
        return chunks
    elif KIND == 3:
        return tl.load(lut + _codes(chunks, SLOT, BITS)).to(tl.float16)
    else:
        return _halves(chunks, SLOT, BITS, BITS * PER, PAIRS)


@triton.jit(do_not_specialize=["runs", "run_tokens", "parts", "tiles", "heads", "splits"])
def _split(
    query, k_table, k_lut, v_table, v_lut, shifts, sinks, first, part_out, part_lse,
    runs, run_tokens, parts, tiles, heads, splits, scaling,
    GROUP_HEADS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SINKS: tl.constexpr,
    PADDED: tl.constexpr, K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_PER: tl.constexpr, K_BLOCK: tl.constexpr,
    K_GROUP: tl.constexpr, K_OFFSET: tl.constexpr, V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_PER: tl.constexpr,
    V_GROUP: tl.constexpr, V_OFFSET: tl.constexpr, NUMBERS: tl.constexpr, PAIRS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    run_tokens = tl.multiple_of(run_tokens, 16)
    run, part = split // parts, split % parts
    k_codes, k_scale, k_zero = tl.load(k_table + run), tl.load(k_table + runs + run), tl.load(k_table + 2 * runs + run)
    v_codes, v_scale, v_zero = tl.load(v_table + run), tl.load(v_table + runs + run), tl.load(v_table + 2 * runs + run)
    SLOTS: tl.constexpr = K_PER if K_KIND == 1 else 1
    N: tl.constexpr = R * SLOTS  # tokens of a tile; token r * SLOTS + slot is row r of a slot
    K_SLOTS: tl.constexpr = 1 if K_KIND == 1 else K_PER  # parts of a key by channels
    KX: tl.constexpr = D // K_SLOTS
    VX: tl.constexpr = D // V_PER
    K_UNIT: tl.constexpr = 1 << K_BITS if K_KIND != 0 else 1
    V_UNIT: tl.constexpr = 1 << V_BITS if V_KIND != 0 else 1
    V_GROUPS: tl.constexpr = D // V_GROUP
    member, r, kx, vx = tl.arange(0, M), tl.arange(0, R), tl.arange(0, KX), tl.arange(0, VX)
    real = member < GROUP_HEADS
    q = ()
    q_sum = tl.zeros((KX, M), tl.float32)
    for slot in tl.static_range(K_SLOTS):
        asked = (pair * GROUP_HEADS + member)[None, :] * D + (kx * K_SLOTS + slot)[:, None]
        own = tl.load(query + asked, mask=real[None, :], other=0.0).to(tl.float32) * (scaling * 1.4426950408889634)
        if K_KIND != 1 or K_GROUP % N != 0:
            own = own.to(tl.float16)
        q = q + (own,)
        q_sum += own.to(tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    lift = tl.zeros((M,), tl.float32)
    mixed = (tl.zeros((VX, M), tl.float32),) * V_PER
    for tile in tl.range(part * tiles, min((part + 1) * tiles, run_tokens // N), num_stages=STAGES):
        start = tile * N
        row = pair * run_tokens + start  # of tensors that lie token by token
        # Scores, in units of log 2.
        scores = ()
        if K_KIND == 1:
            PER_BLOCK: tl.constexpr = K_BLOCK // K_PER
            GROUPS: tl.constexpr = K_BLOCK // K_GROUP
            block = pair * (run_tokens // K_BLOCK) + start // K_BLOCK
            if K_BLOCK >= N:
                inside = start % K_BLOCK
                chunk = kx[None, :] * PER_BLOCK + r[:, None]
                group = kx[None, :] * GROUPS + (r[:, None] * K_PER) // K_GROUP
            else:
                inside = 0
                chunk = (r[:, None] // PER_BLOCK * D + kx[None, :]) * PER_BLOCK + r[:, None] % PER_BLOCK
                token = r[:, None] * K_PER
                group = (token // K_BLOCK * D + kx[None, :]) * GROUPS + token % K_BLOCK // K_GROUP
            base = block * D * PER_BLOCK + inside // K_PER
            chunks = _chunks(k_codes, base, chunk, r[:, None] % 4, shifts, K_BITS, K_PER)
            base = block * D * GROUPS + inside // K_GROUP
            if K_GROUP % N == 0:
                steps = tl.load(_pointer(k_scale, tl.float16) + base + kx * GROUPS).to(tl.float32) * K_UNIT
                zeros = tl.load(_pointer(k_zero, tl.float16) + base + kx * GROUPS).to(tl.float32) / K_UNIT + 1
                # Both terms use the query as rounded here, so a large zero does not magnify its rounding.
                scaled = (q[0] * steps[:, None]).to(tl.float16)
                below = tl.sum(scaled.to(tl.float32) * zeros[:, None], 0)[None, :]
                for slot in tl.static_range(SLOTS):
                    keys = _halves(chunks, slot, K_BITS, K_BITS * K_PER, PAIRS)
                    scores = scores + (tl.dot(keys, scaled) - below,)
            else:
                steps = tl.load(_pointer(k_scale, tl.float16) + base + group) * K_UNIT
                zeros = tl.load(_pointer(k_zero, tl.float16) + base + group) * (1 / K_UNIT)
                below = steps + zeros * steps
                for slot in tl.static_range(SLOTS):
                    keys = _halves(chunks, slot, K_BITS, K_BITS * K_PER, PAIRS) * steps - below
                    scores = scores + (tl.dot(keys, q[0]),)
        else:
            place = r[:, None] * KX + kx[None, :]
            if K_KIND == 0:
                chunks = tl.load(_pointer(k_codes, NUMBERS) + row * KX + place).to(tl.float16)
            else:
                chunks = _chunks(k_codes, row * KX, place, kx[None, :] % 4, shifts, K_BITS, K_PER)
            found = tl.zeros((R, M), tl.float32)
            if K_KIND == 2 and K_GROUP < D:
                TOKEN_GROUPS: tl.constexpr = D // K_GROUP
                group = r[:, None] * TOKEN_GROUPS + (kx[None, :] * K_PER) // K_GROUP
                steps = tl.load(_pointer(k_scale, tl.float16) + row * TOKEN_GROUPS + group) * K_UNIT
                zeros = tl.load(_pointer(k_zero, tl.float16) + row * TOKEN_GROUPS + group) * (1 / K_UNIT)
                below = steps + zeros * steps
                for slot in tl.static_range(K_SLOTS):
                    keys = _halves(chunks, slot, K_BITS, K_BITS * K_PER, PAIRS) * steps - below
                    found = tl.dot(keys, q[slot], found)
            else:
                for slot in tl.static_range(K_SLOTS):
                    keys = _numbers(chunks, k_lut, slot, K_KIND, K_BITS, K_PER, PAIRS)
                    found = tl.dot(keys, q[slot], found)
                if K_KIND == 2:
                    steps = tl.load(_pointer(k_scale, tl.float16) + row + r).to(tl.float32) * K_UNIT
                    zeros = tl.load(_pointer(k_zero, tl.float16) + row + r).to(tl.float32) / K_UNIT + 1
                    found = (found - tl.sum(q_sum, 0)[None, :] * zeros[:, None]) * steps[:, None]
                if K_KIND == 3:
                    found *= tl.load(_pointer(k_scale, tl.float16) + row + r).to(tl.float32)[:, None]
                    if K_OFFSET:
                        offsets = tl.load(_pointer(k_zero, tl.float16) + row + r).to(tl.float32)
                        found += tl.sum(q_sum, 0)[None, :] * offsets[:, None]
            scores = scores + (found,)
        if SINKS > 0 or PADDED:
            seen = ()
            for slot in tl.static_range(SLOTS):
                position = run * run_tokens + start + r * SLOTS + slot
                hidden = position < (tl.load(first + pair // heads) if PADDED else 0)
                for number in tl.static_range(SINKS):
                    hidden = hidden | (position == tl.load(sinks + pair // heads * SINKS + number))
                seen = seen + (tl.where(hidden[:, None], float("-inf"), scores[slot]),)
            scores = seen
        peaks = scores[0]
        for slot in tl.static_range(1, SLOTS):
            peaks = tl.maximum(peaks, scores[slot])
        peak = tl.maximum(top, tl.max(peaks, 0))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        fade = tl.exp2(top - safe)
        top = peak
        faded = ()
        for part_of in tl.static_range(V_PER):
            faded = faded + (mixed[part_of] * fade[None, :],)
        lift *= fade
        # Weighted sums of values.
        shares = tl.zeros((R, M), tl.float32)
        lifts = tl.zeros((R, M), tl.float32)
        for slot in tl.static_range(SLOTS):
            share = tl.exp2(scores[slot] - safe[None, :])
            shares += share
            token = r * SLOTS + slot
            place = token[None, :] * VX + vx[:, None]
            if V_KIND == 0:
                chunks = tl.load(_pointer(v_codes, NUMBERS) + row * VX + place).to(tl.float16)
                weights = share.to(tl.float16)
            else:
                chunks = _chunks(v_codes, row * VX, place, vx[:, None] % 4, shifts, V_BITS, V_PER)
            if V_KIND == 2 and V_GROUP < D:
                group = token[None, :] * V_GROUPS + (vx[:, None] * V_PER) // V_GROUP
                weights = share.to(tl.float16)
                steps = tl.load(_pointer(v_scale, tl.float16) + row * V_GROUPS + group) * V_UNIT
                zeros = tl.load(_pointer(v_zero, tl.float16) + row * V_GROUPS + group) * (1 / V_UNIT)
                below = steps + zeros * steps
            elif V_KIND == 2:
                steps = tl.load(_pointer(v_scale, tl.float16) + row + token).to(tl.float32) * V_UNIT
                zeros = tl.load(_pointer(v_zero, tl.float16) + row + token).to(tl.float32) / V_UNIT + 1
                weights = (share * steps[:, None]).to(tl.float16)
                lifts -= weights.to(tl.float32) * zeros[:, None]
            elif V_KIND == 3:
                steps = tl.load(_pointer(v_scale, tl.float16) + row + token).to(tl.float32)
                weights = (share * steps[:, None]).to(tl.float16)
                if V_OFFSET:
                    offsets = tl.load(_pointer(v_zero, tl.float16) + row + token).to(tl.float32)
                    lifts += share * offsets[:, None]
            summed = ()
            for part_of in tl.static_range(V_PER):
                values = _numbers(chunks, v_lut, part_of, V_KIND, V_BITS, V_PER, PAIRS)
                if V_KIND == 2 and V_GROUP < D:
                    values = values * steps - below
                summed = summed + (tl.dot(values, weights, faded[part_of]),)
            faded = summed
        total = total * fade + tl.sum(shares, 0)
        lift += tl.sum(lifts, 0)
        mixed = faded
    sums = tl.where(total == 0.0, 1.0, total)
    out = (pair * GROUP_HEADS + member) * splits + split
    for part_of in tl.static_range(V_PER):
        place = out[None, :] * D + (vx * V_PER + part_of)[:, None]
        tl.store(part_out + place, (mixed[part_of] + lift[None, :]) / sums[None, :], mask=real[None, :])
    tl.store(part_lse + out, tl.where(total == 0.0, float("-inf"), top + tl.log2(sums)), mask=real)


@triton.jit(do_not_specialize=["splits"])
def _merge(part_out, part_lse, out, lse, splits, D: tl.constexpr, S: tl.constexpr):
    """Stretches of one head; log-sum-exps come in units of log 2."""
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
        share = tl.exp2(tl.load(part_lse + head * splits + split, mask=here, other=float("-inf")) - safe)
        place = (head * splits + split)[:, None] * D + channel[None, :]
        rows = tl.load(part_out + place, mask=here[:, None], other=0.0)
        mixed += tl.sum(rows * share[:, None], 0)
        total += tl.sum(share, 0)
    sums = tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * D + channel, mixed / sums)
    tl.store(lse + head, tl.where(total == 0.0, float("-inf"), (safe + tl.log2(sums)) * 0.6931471805599453))


def _power(*sizes: int) -> bool:
    return all(size > 0 and size & (size - 1) == 0 for size in sizes)


def fits(keys: Tiles, values: Tiles, channels: int, run_tokens: int, rows: int = DEPTH) -> bool:
    """Whether the kernel can read these tiles: sizes are powers of two, and tiles begin with a chunk."""
    k_chunk, v_chunk = keys.chunk(channels), values.chunk(channels)
    powers = _power(channels, rows, keys.group, values.group, keys.block)
    if not (powers and channels >= DEPTH and k_chunk and v_chunk):
        return False
    tile = rows * k_chunk if keys.kind == "channel" else rows
    if keys.kind == "channel" and (keys.block < 4 * k_chunk or keys.group < k_chunk):
        return False
    # Four chunks of 3 bits fill three words, and a chunk lies in one group.
    rows_of_three = [side for side in (keys, values) if side.num_bits == 3 and side.kind != "channel"]
    whole = all(channels % 32 == 0 for _ in rows_of_three)
    grouped = all(side.kind != "token" or side.group >= side.chunk(channels) for side in (keys, values))
    return whole and grouped and rows >= DEPTH and run_tokens % max(tile, keys.block) == 0


class DecodeAttention:
    """Attention over fixed runs of coded keys and values; addresses and workspace are made once, so that a call is two
    launches and can be captured in a CUDA graph."""

    def __init__(
        self, keys: Tiles, values: Tiles, batch: int, heads: int, query_heads: int, channels: int, run_tokens: int, *,
        device: torch.device, parts: int | None = None, sinks: Tensor | None = None, first: Tensor | None = None,
        rows: int | None = None, num_warps: int = 1, num_stages: int | None = None, registers: int | None = None,
    ):  # fmt: skip
        """``run_tokens``: tokens of each run. ``parts``: programs for each run and KV head (None: enough to fill the
        GPU). ``sinks`` int64 ``[B, S]``: tokens that are left out; ``first`` int64 ``[B]``: tokens before it are.
        ``rows``: chunks (of keys by channel) or tokens of a tile. ``registers``: the most that a thread may have.
        Raises ValueError where sizes do not fit the kernel (see `fits`)."""
        rows = rows or (DEPTH if keys.kind == "channel" else 2 * DEPTH)
        if not fits(keys, values, channels, run_tokens, rows):
            raise ValueError(
                f"{run_tokens} tokens of {channels} channels in tiles of {rows} rows do not fit the kernel."
            )
        if num_stages is None:
            # A tile of scales among what is loaded ahead would send all numbers through shared memory.
            k_tile = keys.kind == "channel" and keys.group % (rows * keys.chunk(channels))
            by_group = any(side.kind == "token" and side.group < channels for side in (keys, values))
            num_stages = 1 if k_tile or by_group else 2
        self.keys, self.values = keys, values  # whose memory the addresses point to
        k_chunk, v_chunk = keys.chunk(channels), values.chunk(channels)
        self.tile = rows * k_chunk if keys.kind == "channel" else rows
        runs, tiles = len(keys.runs), run_tokens // self.tile
        if parts is None:
            parts = PROGRAMS // max(1, batch * heads * runs)
        each = -(-tiles // max(1, parts))
        parts = -(-tiles // each)
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
            torch.tensor([0, 24, 16, 8], dtype=torch.int32, device=device),
            empty if sinks is None else sinks, empty if first is None else first,
        )  # fmt: skip
        self._sizes = (runs, run_tokens, parts, each, heads, self.splits)
        dense = next((run[0].dtype for side in (keys, values) if side.kind == "dense" for run in side.runs), None)
        self._meta: dict[str, Any] = {
            "GROUP_HEADS": query_heads // heads, "M": max(HEADS, triton.next_power_of_2(query_heads // heads)),
            "D": channels, "R": rows, "SINKS": 0 if sinks is None else sinks.shape[1], "PADDED": first is not None,
            "K_KIND": KINDS[keys.kind], "K_BITS": keys.num_bits, "K_PER": k_chunk, "K_BLOCK": keys.block,
            "K_GROUP": keys.group, "K_OFFSET": len(keys.runs[0]) > 2,
            "V_KIND": KINDS[values.kind], "V_BITS": values.num_bits, "V_PER": v_chunk, "V_GROUP": values.group,
            "V_OFFSET": len(values.runs[0]) > 2, "NUMBERS": NUMBERS[dense or torch.float16],
            "PAIRS": not isinstance(_split, InterpretedFunction), "STAGES": num_stages, "num_warps": num_warps,
            "num_stages": num_stages,
        }  # fmt: skip
        if registers is not None:
            self._meta["maxnreg"] = registers

    def __call__(self, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """``query [B, Hq, D]``; the result float32 ``[B, Hq, D]`` and its log-sum-exp ``[B, Hq]``, overwritten by the
        next call."""
        _split[self._grid](
            query.contiguous(), *self._tensors, self._partial, self._partial_lse, *self._sizes, scaling, **self._meta
        )
        heads, channels = self._partial.shape[0], self._partial.shape[2]
        _merge[(heads,)](self._partial, self._partial_lse, self.out, self.lse, self.splits, D=channels, S=32)
        return self.out, self.lse
