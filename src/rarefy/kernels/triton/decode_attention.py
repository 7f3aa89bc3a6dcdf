"""Attention of one query token over keys and values in code (split-KV flash decoding, Dao et al. 2023).

One program takes all query heads of one KV head and one stretch of tokens, and leaves a weighted sum of values with its
log-sum-exp; a second kernel merges stretches. What differs between codecs is how codes become numbers (``tiles.py``),
which the ``*_KIND`` of each side says:

* ``DENSE``: numbers ``[tokens, D]`` of any float dtype;
* ``CHANNEL`` (keys): uniform codes ``[blocks, D, block]`` with a scale and zero for ``group`` tokens of a channel;
* ``TOKEN``: uniform codes ``[tokens, D]`` with a scale and zero for ``group`` channels of a token;
* ``TABLE``: codes ``[tokens, D]`` into a table, times a scale and plus an offset for each token (or, for keys, for each
  channel);
* ``PRODUCT``: a code for each of ``D / width`` parts of a token, of whose entries the codebook holds the numbers.

Heads are the columns of all products, so that it is not the codes that need padding. Scales and zeros go into the
query, the weights and the sums where they can. Keys before RoPE meet the query twice, times the cosines and times the
sines of their place in the tile; the query is turned back by the tile's first position instead of them being turned to
it. Outliers and low-rank corrections are added to scores and sums. Tokens lie in *runs* of equal length, each with its
own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from rarefy.core.errors import UnsupportedError
from rarefy.kernels.coded import DEPTH, KINDS, Tiles, Turns
from rarefy.kernels.triton.decode_stretch import attend_stretch

NUMBERS = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
}  # fmt: skip
INDICES = {torch.uint8: tl.uint8, torch.int16: tl.int16}
HEADS = 8  # the fewest columns that a tensor core multiplies
COLUMNS = 16  # the most that heads of several groups of tokens take
MERGED, STRETCHES = 16, 128  # channels of a program that merges, and the stretches that it reads at once
PROGRAMS = {"channel": 132 * 8, "token": 132 * 12}  # that a large GPU runs at once; a second round waits for the first
ROWS = {"channel": DEPTH, "token": 4 * DEPTH}  # of a tile
# Of lists, whose programs are shorter; and the most that share one.
LISTED, SHARED = {"channel": 132 * 8, "token": 132 * 16}, 64


@triton.jit(do_not_specialize=["splits"])
def _merge(part_out, part_lse, out, lse, splits, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """``C`` channels of all stretches of one head, ``S`` at a time."""
    head, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mixed = tl.zeros((C,), tl.float32)
    for start in range(0, splits, S):
        split = start + tl.arange(0, S)
        here = split < splits
        own = tl.load(part_lse + head * splits + split, mask=here, other=float("-inf"))
        place = (head * splits + split)[:, None] * D + channel[None, :]
        rows = tl.load(part_out + place, mask=here[:, None], other=0.0)
        peak = tl.maximum(top, tl.max(own, 0))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        share, fade = tl.exp(own - safe), tl.exp(top - safe)
        mixed = mixed * fade + tl.sum(rows * share[:, None], 0)
        total = total * fade + tl.sum(share, 0)
        top = peak
    sums = tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * D + channel, mixed / sums)
    if tl.program_id(1) == 0:
        tl.store(lse + head, tl.where(total == 0.0, float("-inf"), top + tl.log(sums)))


def merge(part_out: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Put sums of stretches ``part_out`` float32 ``[heads, stretches, D]``, with log-sum-exps ``part_lse``, together
    into ``out [..., D]`` and ``lse [...]`` of as many heads, D being a multiple of 16."""
    heads, splits, channels = part_out.shape
    grid = heads, channels // MERGED
    _merge[grid](part_out, part_lse, out, lse, splits, D=channels, C=MERGED, S=STRETCHES, num_warps=4)


def _power(*sizes: int) -> bool:
    return all(size > 0 and size & (size - 1) == 0 for size in sizes)


def _tile(keys: Tiles, channels: int, rows: int) -> int:
    """Tokens of a tile."""
    return rows * keys.chunk(channels) if keys.kind == "channel" else rows


def fits(
    keys: Tiles, values: Tiles, channels: int, run_tokens: int, rows: int = DEPTH, turns: Turns | None = None,
    block: int | None = None,
) -> bool:  # fmt: skip
    """Whether the kernel can read these tiles: sizes are powers of two, and tiles begin with a chunk and lie in a
    block, where blocks are listed."""
    chunks = keys.chunk(channels), values.chunk(channels)
    powers = _power(channels, rows, keys.group, values.group, keys.block, values.block, *chunks)
    if not powers or channels < DEPTH or rows < DEPTH or values.kind == "channel":
        return False
    tile = _tile(keys, channels, rows)
    if block is not None and (block % tile or run_tokens % block):
        return False
    if keys.kind == "channel" and (keys.block < 4 * chunks[0] or keys.group < chunks[0] or turns is not None):
        return False
    if "float8" in (keys.kind, values.kind) or values.order is not None:
        return False
    if keys.order is not None and (keys.kind == "channel" or keys.outliers is not None or keys.low_rank is not None):
        return False
    for side, chunk in zip((keys, values), chunks, strict=True):
        by_token = side.kind != "channel"
        # Four chunks of 3 bits fill three words, a chunk lies in one group, and rows of codes begin with a word.
        if by_token and side.num_bits == 3 and channels % 32:
            return False
        if (side.kind == "token" and side.group < chunk) or (side.joined and side.kind != "table"):
            return False
        if side.kind == "product" and channels // chunk * side.num_bits % 32:
            return False
        if side.outliers is not None and (side.outliers.count > DEPTH or by_token != (side.outliers.axis == "token")):
            return False
        in_blocks = side.low_rank is not None or (side.outliers is not None and not by_token)
        if (in_blocks and side.block % tile) or (side.low_rank is not None and side.low_rank.rank > DEPTH):
            return False
    return run_tokens % max(tile, keys.block, values.block) == 0


def _virtual(keys: Tiles, tile: int, pitch: int) -> int:
    """How many groups of a tile's keys have columns of their own, one if scales belong to whole tiles or to too many
    groups. ``pitch``: columns of a group."""
    groups = tile // keys.group if keys.kind == "channel" and tile % keys.group == 0 else 1
    return groups if pitch * groups <= COLUMNS else 1


def _stages(keys: Tiles, values: Tiles, channels: int, tile: int, virtual: int) -> int:
    """How many tiles are loaded ahead. Tiles of scales or corrections among them would send all numbers through shared
    memory, and entries of tables are no tiles."""
    by_group = keys.kind == "channel" and keys.group % tile != 0 and virtual == 1
    by_group |= keys.kind == "token" and keys.group < channels
    by_group |= values.kind == "token" and 2 * values.group < channels
    corrected = any(side.outliers is not None or side.low_rank is not None for side in (keys, values))
    in_table = any(side.kind == "product" or (side.kind == "table" and side.num_bits > 4) for side in (keys, values))
    return 1 if by_group or corrected or in_table else 2


class DecodeAttention:
    """Attention over fixed runs of coded keys and values, or over blocks of them that lists name; addresses and
    workspace are made once, so that a call is two launches and can be captured in a CUDA graph."""

    def __init__(
        self, keys: Tiles, values: Tiles, batch: int, heads: int, query_heads: int, channels: int, run_tokens: int, *,
        device: torch.device, parts: int | None = None, sinks: Tensor | None = None, first: Tensor | None = None,
        turns: Turns | None = None, origin: int = 0, rows: int | None = None, num_warps: int = 1,
        num_stages: int | None = None, registers: int | None = None, block: int | None = None,
        lengths: tuple[Sequence[int], Sequence[int]] | None = None,
    ):  # fmt: skip
        """``run_tokens``: tokens of each run. ``parts``: programs for each run and KV head (None: enough to fill the
        GPU). ``sinks`` int64 ``[B, S]``: tokens that are left out; ``first`` int64 ``[B]``: tokens before it are.
        ``turns``: keys are without RoPE. ``origin``: the first run's first token. ``rows``: chunks (of keys by channel)
        or tokens of a tile. ``registers``: the most that a thread may have.

        ``block``: tokens of the blocks that lists name (None: all tokens are read). Programs then share a list, and
        runs may be of the ``lengths`` given for keys and values, in pages of ``run_tokens``. Raises UnsupportedError
        where sizes do not fit the kernel (see `fits`).
        """
        if block is not None:
            keys = replace(keys, within=block)
        rows = rows or ROWS.get(keys.kind, 2 * DEPTH)
        rows = rows if block is None or keys.kind == "channel" else min(rows, block)
        if not fits(keys, values, channels, run_tokens, rows, turns, block):
            raise UnsupportedError(
                f"{run_tokens} tokens of {channels} channels in tiles of {rows} rows do not fit the kernel."
            )
        self.keys, self.values = keys, values  # whose memory the addresses point to
        chunks = keys.chunk(channels), values.chunk(channels)
        self.tile = _tile(keys, channels, rows)
        runs, tiles = len(keys.runs), run_tokens // self.tile
        if lengths is None:
            tables = [side.pointers(device, run_tokens) for side in (keys, values)]
        else:
            counts = page_counts(lengths, run_tokens)
            runs = sum(counts[0])
            tables = [
                side.pages(device, own, count, run_tokens)
                for side, own, count in zip((keys, values), lengths, counts, strict=True)
            ]
        self.tokens = runs * run_tokens
        known = PROGRAMS if block is None else LISTED
        programs = known.get(keys.kind, known["token"])
        if block is not None:
            each, parts = 0, parts or max(1, min(SHARED, programs // (batch * heads)))
        else:
            each = -(-tiles // max(1, parts or programs // max(1, batch * heads * runs)))
            parts = -(-tiles // each)
        self.splits = parts if block else runs * parts
        pitch = triton.next_power_of_2(query_heads // heads)
        virtual = _virtual(keys, self.tile, pitch)
        empty = torch.zeros(1, device=device)
        self.out = torch.empty(batch, query_heads, channels, device=device)
        self.lse = torch.empty(batch, query_heads, device=device)
        self._partial = torch.empty(batch * query_heads, self.splits * virtual, channels, device=device)
        self._partial_lse = torch.empty(batch * query_heads, self.splits * virtual, device=device)
        self._grid = (batch * heads, self.splits)
        if num_stages is None:
            num_stages = _stages(keys, values, channels, self.tile, virtual)
            # Where a tile lies is known from the list only, which is one more load to be ahead of.
            num_stages += block is not None and num_stages > 1
        pairs = not isinstance(attend_stretch, InterpretedFunction)
        inside, starts, rotated = empty, empty, 0
        if turns is not None:
            inside, starts = turns.tables(channels, rows, origin, runs * run_tokens, chunks[0])
            rotated = len(turns.inv_freq)
        center, spread = (empty, empty) if keys.affine is None else keys.affine
        self._tensors = (
            tables[0], _table(keys, empty, pairs), tables[1], _table(values, empty, pairs),
            torch.tensor([0, 24, 16, 8], dtype=torch.int32, device=device), empty if sinks is None else sinks,
        )  # fmt: skip
        order = empty if keys.order is None else keys.order.to(device)
        self._more = (center, spread, order, inside, starts)
        self._first = first
        self._none = torch.zeros(1, dtype=torch.int64, device=device)
        self._sizes = (runs, run_tokens, parts, each, heads, self.splits, rotated, origin)
        dense = next((run[0].dtype for side in (keys, values) if side.kind == "dense" for run in side.runs), None)
        self._meta: dict[str, Any] = {
            "GROUP_HEADS": query_heads // heads, "PITCH": pitch, "VIRTUAL": virtual,
            "M": max(HEADS, pitch * virtual), "D": channels, "R": rows,
            "ORDERED": keys.order is not None,
            "SINKS": 0 if sinks is None else sinks.shape[1], "LISTED": block or 0, "ROPE": turns is not None,
            "NUMBERS": NUMBERS[dense or torch.float16],
            "PAIRS": pairs, "STAGES": num_stages,
            **_options("K", keys, chunks[0]), **_options("V", values, chunks[1]),
            "num_warps": num_warps, "num_stages": num_stages,
        }  # fmt: skip
        for name in ("V_SCALE", "V_AFFINE"):
            del self._meta[name]
        if registers is not None:
            self._meta["maxnreg"] = registers

    def __call__(
        self, query: Tensor, scaling: float, lists: tuple[Tensor, Tensor] | None = None, first: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``query [B, Hq, D]``; the result float32 ``[B, Hq, D]`` and its log-sum-exp ``[B, Hq]``, overwritten by the
        next call. ``lists``: which blocks are read, int32 ``[B, Hkv, capacity]``, and how many of those, int32
        ``[B, Hkv]``; blocks beyond the runs are left out. ``first`` int64 ``[B]`` as above, for this call."""
        first = self._first if first is None else first
        index, count = (self._none, self._none) if lists is None else lists
        attend_stretch[self._grid](
            query.contiguous(), *self._tensors, self._none if first is None else first, *self._more, self._partial,
            self._partial_lse, *self._sizes, scaling, index, count, index.shape[-1], PADDED=first is not None,
            **self._meta,
        )  # fmt: skip
        merge(self._partial, self._partial_lse, self.out, self.lse)
        return self.out, self.lse


def page_counts(lengths: tuple[Sequence[int], Sequence[int]], page: int) -> list[list[int]]:
    """How many whole pages the runs of keys and of values have from their beginning on, before one that lies in two
    runs, as far as both have them."""
    found = []
    for own in lengths:
        counts: list[int] = []
        for length in own:
            counts.append(length // page)
            if length % page:
                break
        found.append(counts + [0] * (len(own) - len(counts)))
    least = min(map(sum, found))
    for counts in found:
        for number in reversed(range(len(counts))):
            counts[number] -= min(counts[number], sum(counts) - least)
    return found


def _table(side: Tiles, empty: Tensor, pairs: bool) -> Tensor:
    """The table as the kernel reads it: of codebooks, two numbers of an entry at once; of others on a GPU, int32 words
    of all lower bytes, then of all upper ones."""
    if side.lut is None:
        return empty
    if side.kind == "product":
        return side.lut.half().contiguous().view(torch.int32)
    if not pairs or side.num_bits > 4:
        return side.lut
    whole = side.lut.half().repeat(16 // len(side.lut))
    return whole.view(torch.uint8).unflatten(0, (16, 2)).T.contiguous().view(torch.int32).flatten()


def _options(prefix: str, side: Tiles, chunk: int) -> dict[str, Any]:
    """What the kernel is compiled for, of one side."""
    outliers = side.outliers
    found = {
        "KIND": KINDS[side.kind], "BITS": side.num_bits, "PER": chunk, "BLOCK": side.block, "GROUP": side.group,
        "SCALE": len(side.runs[0]) > 1, "OFFSET": len(side.runs[0]) > 2, "JOINED": side.joined,
        "AFFINE": side.affine is not None, "ENTRIES": 0 if outliers is None else outliers.count,
        "INDEX": tl.uint8 if outliers is None else INDICES[outliers.runs[0][1].dtype],
        "RANK": 0 if side.low_rank is None else side.low_rank.rank,
    }  # fmt: skip
    return {f"{prefix}_{name}": value for name, value in found.items()}
