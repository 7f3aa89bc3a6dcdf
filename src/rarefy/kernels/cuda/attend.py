"""Attention of one new token over coded keys and values by ``attend.cu``: what it is compiled for, and its launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rarefy.core.errors import UnsupportedError
from rarefy.kernels.coded import KINDS, Tiles, Turns
from rarefy.kernels.cuda import driver

SOURCE = Path(__file__).with_name("attend.cu")
TILE, PIECE, CHANNELS, MOST_HEADS = 128, 32, 128, 8
MOST_RANK = 8  # rows of a product
MOST_ENTRIES = 64  # outliers of a row: a lane has a bit for each of its half
BLOCKS_OF_REST = 8  # that share what fills no tile
TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
LOG2E = 1.4426950408889634
TURN_WORDS = 72  # of a place
COPIES = 32  # of a table, one for each lane
MOST_SHARED = 227 << 10  # bytes that a block may have on Hopper, where a device does not tell
STATIC_SHARED = 64  # of them, that are not asked for: who comes last


@dataclass(frozen=True)
class Shape:
    """``warps`` of a block, ``blocks`` of a multiprocessor, parts of a tile (of 16 tokens, or channels of keys by
    channel) that are loaded ahead, and tokens of a ``tile``: 128 where codes or corrections are of blocks, else 64 will
    do."""

    warps: int = 8
    blocks: int = 1
    depth: int = 4
    tile: int = TILE


@dataclass(frozen=True)
class Code:
    """How keys or values are stored; names as in ``Tiles``. ``entries``: outliers of a token, or of a channel of a
    tile, with indices of ``index_bytes``; ``rank``: of a matrix that is added to a tile."""

    kind: str
    num_bits: int
    group: int
    scale: bool
    offset: bool
    affine: bool = False
    entries: int = 0
    index_bytes: int = 2
    rank: int = 0

    @property
    def book(self) -> int:
        """Bytes of a codebook as the kernel reads it."""
        return 4 * CHANNELS // 2 << 8 if self.kind == "product" else 0

    @property
    def table(self) -> int:
        """Bytes of the rows of a table, in which keys and values have a half each."""
        return 2 * 4 * COPIES << 2 * self.num_bits if self.kind == "table" else 0

    def scales(self, tile: int) -> int:
        """Bytes of the scales and zeros of so many tokens."""
        one = 2 * tile * (CHANNELS // self.group) if self.kind in ("channel", "token") else 2 * tile
        return one * (self.scale + self.offset)


def fits(keys: Tiles, values: Tiles, channels: int, heads: int) -> bool:
    """Whether the kernel can read these tiles, for so many query heads over one of them."""
    if channels != CHANNELS or heads > MOST_HEADS or values.kind == "channel" or values.affine is not None:
        return False
    if values.order is not None or (keys.order is not None and keys.kind != "product"):
        return False
    if keys.joined != values.joined or (keys.kind == "table" and keys.affine is None and _tensors(keys) == 1):
        return False
    if _tensors(values) == 1 and values.kind == "table":
        return False
    if keys.kind == "token" and (keys.outliers or keys.low_rank):
        return False
    sides = keys, values
    blocked = any(side.low_rank or (side.outliers and not side.joined) for side in sides)
    if blocked and (keys.joined or any(side.block != TILE for side in sides)):
        return False  # what fills no tile is read without them
    return all(_fits(side) for side in sides)


def _fits(side: Tiles) -> bool:
    if side.kind in ("channel", "token") and (side.outliers or side.low_rank):
        axis = side.kind if side.outliers is None else side.outliers.axis
        few = side.low_rank is None or not side.low_rank.runs or side.low_rank.rank <= MOST_RANK
        return axis == side.kind and few and _fits(replace(side, outliers=None, low_rank=None))
    if side.low_rank is not None or (side.kind != "table" and (side.outliers or side.affine or side.joined)):
        return False
    if side.outliers is not None and not side.joined:
        return False
    if side.outliers is not None and (
        side.outliers.axis != "token"
        or (side.outliers.runs and (side.outliers.count % 2 or side.outliers.count > MOST_ENTRIES))
    ):
        return False
    match side.kind:
        case "channel":
            return side.block == TILE and side.group in (32, 64, 128) and side.num_bits in (2, 3, 4, 8)
        case "token":
            return side.group in (32, 64, 128) and side.num_bits in (2, 3, 4, 8)
        case "table":
            return side.num_bits in (2, 3, 4)
        case "float8":
            return True
        case "product":
            return side.num_bits == 8 and side.lut is not None and side.lut.shape[-1] == 2
    return False


def _tensors(side: Tiles) -> int:
    """How many tensors a run has; where there is none, as many as such codes may have."""
    if side.runs:
        return len(side.runs[0])
    return {"product": 1, "float8": 2, "table": 1 if side.affine else 2}.get(side.kind, 3)


def code_of(side: Tiles) -> Code:
    tensors, outliers = _tensors(side), side.outliers
    group = side.group if side.kind in ("channel", "token") else CHANNELS
    entries = 0 if outliers is None or not outliers.runs else outliers.count
    width = outliers.runs[0][1].element_size() if entries and outliers else 2
    rank = side.low_rank.rank if side.low_rank is not None and side.low_rank.runs else 0
    affine = side.affine is not None
    return Code(side.kind, side.num_bits, group, tensors > 1, tensors > 2, affine, entries, width, rank)


_POINTERS = (
    "query out lse places pieces k_signs v_signs k_order k_table v_table k_center k_spread turns starts sinks "
    "part_out part_lse arrived k_tail v_tail k_sink v_sink".split()
)


_SIZES = "tiles heads splits count_of_pieces count_of_starts k_coded v_coded length".split()


class Arguments(ctypes.Structure):
    """``Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int) for name in _SIZES),
        ("scaling", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Program:
    """One compiled form of the kernel. ``rotated``: keys and values; ``query`` and ``exact``: types of the query and of
    what is not in code."""

    keys: Code
    values: Code
    rotated: tuple[bool, bool]
    turned: bool
    joined: bool
    same_table: bool
    group_heads: int
    query: torch.dtype
    exact: torch.dtype
    sinks: int
    shape: Shape

    def definitions(self) -> dict[str, int]:
        """The macros of the source."""
        found = {
            "SAME_TABLE": int(self.same_table), "GROUP_HEADS": self.group_heads, "QUERY": TYPES[self.query],
            "EXACT": TYPES[self.exact], "SINKS": self.sinks, "WARPS": self.shape.warps, "BLOCKS": self.shape.blocks,
            "DEPTH": self.shape.depth, "TILE": self.shape.tile, "HALF": 1, "K_SCALE": int(self.keys.scale),
            "K_SPREAD": int(self.keys.affine), "TURNED": int(self.turned), "JOINED": int(self.joined),
            "INDEX_BYTES": min(self.keys.index_bytes, self.values.index_bytes),
        }  # fmt: skip
        for prefix, code, rotated in (("K", self.keys, self.rotated[0]), ("V", self.values, self.rotated[1])):
            found |= {
                f"{prefix}_KIND": KINDS[code.kind], f"{prefix}_BITS": code.num_bits, f"{prefix}_GROUP": code.group,
                f"{prefix}_OFFSET": int(code.kind == "table" and code.offset), f"{prefix}_ROTATED": int(rotated),
                f"{prefix}_ENTRIES": code.entries, f"{prefix}_RANK": code.rank,
            }  # fmt: skip
        return found

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(f"-D{macro}={value}" for macro, value in self.definitions().items())

    @property
    def shared_memory(self) -> int:
        """Bytes of a block."""
        tables = max(self.keys.table, self.values.table) + self.keys.book + self.values.book
        tile, turned, pairs = self.shape.tile, int(self.turned), self._pairs
        scales = self.keys.scales(tile) + self.values.scales(tile)
        sums = self.shape.warps * 4 * MOST_HEADS * (CHANNELS + 2)
        turns = 4 * TURN_WORDS * tile * turned
        main = max(tables + turns + 2 * self.shape.warps * scales, sums)
        query = 8 * self.group_heads * CHANNELS
        query += 4 * MOST_HEADS * CHANNELS if turned else 4 * pairs * CHANNELS if self._one_by_one else 0
        spreads = 8 * CHANNELS * self.keys.affine
        rest = 4 * (self.group_heads * CHANNELS * (1 + self.rotated[1]) + 2 * MOST_HEADS)
        tiles = 4 * CHANNELS * turned + self._corrections
        return main + query + spreads + self.shape.warps * (max(tiles, rest) if turned else tiles + rest)

    @property
    def _pairs(self) -> int:
        """Words for all query heads of a KV head."""
        return -(-self.group_heads // 2)

    @property
    def _one_by_one(self) -> bool:
        return self.keys.entries > 0 and self.keys.kind != "channel"

    @property
    def _corrections(self) -> int:
        """Bytes of a warp's lists and matrices, and what it makes of them."""
        one_by_one, tile = self._one_by_one, self.shape.tile
        scattered = 32 * CHANNELS if self.values.entries or (self.keys.entries and not one_by_one) else 0
        beside = 4 * self._pairs * (tile + CHANNELS * self.turned) + 128 * self.turned if one_by_one else 0
        both = self.keys.entries, self.values.entries
        entries, rank = sum(both), self.keys.rank + self.values.rank
        index_bytes = min(self.keys.index_bytes, self.values.index_bytes)
        return max(scattered, beside) + tile * entries * (2 + index_bytes) + 2 * (tile + CHANNELS) * rank

    @property
    def threads(self) -> int:
        return 32 * self.shape.warps


@functools.cache
def kernel(device: int, program: Program) -> driver.Kernel:
    """Compiled once in a process. Raises UnsupportedError where that fails."""
    with torch.cuda.device(device):
        return driver.Kernel(SOURCE, "rarefy_attend", program.options, program.shared_memory)


def places(
    keys: Tiles, values: Tiles, tokens: tuple[Sequence[int], Sequence[int]], tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """Addresses int64 ``[16, tiles]`` of the first head's codes, scales and zeros of keys, then of values, for each
    ``tile`` of tokens that lies in one run of both, how many tokens are from one head to the next, and addresses of
    outliers and their indices, and of both factors of matrices of low rank; and ``[16, pieces]`` of each 32 tokens
    after them.
    ``tokens``: of all runs of keys and of values."""
    both = [_pieces(side, each) for side, each in zip((keys, values), tokens, strict=True)]
    pieces = tile // PIECE
    whole = min(part.shape[1] for part in both) // pieces
    # A tile lies in one run if its last piece is as far from its first as within a run.
    lies = torch.ones(whole, dtype=torch.bool)
    for part in both:
        run = part[-1, : whole * pieces].view(whole, pieces)
        lies &= run[:, 0] == run[:, -1]
    tiles = int(lies.int().cumprod(0).sum()) if whole else 0
    most = max(part.shape[1] for part in both)
    rows = [torch.nn.functional.pad(part, (0, most - part.shape[1])) for part in both]
    order = rows[0][:3], rows[1][:3], rows[0][7:8], rows[1][7:8], *(each[at : at + 2] for at in (3, 5) for each in rows)
    table = torch.cat(order)
    return table[:, : tiles * pieces : pieces].contiguous(), table[:, tiles * pieces :].contiguous()


def _pieces(side: Tiles, tokens: Sequence[int]) -> Tensor:
    """Addresses of codes, scales and zeros, outliers and their indices and both factors of each 32 tokens, their run's
    tokens and its number: int64 ``[9, n]``."""
    if not side.runs:
        return torch.empty(9, 0, dtype=torch.int64)
    rows = []
    for number, (run, length) in enumerate(zip(side.runs, tokens, strict=True)):
        outliers = (None, None) if side.outliers is None else side.outliers.runs[number]
        factors = (None, None) if side.low_rank is None else side.low_rank.runs[number]
        tensors = *run, *[None] * (3 - len(run)), *outliers, *factors
        rows.append([*(0 if each is None else each.data_ptr() for each in tensors), length, number])
    counts = torch.tensor(tokens) // PIECE
    of_run = torch.arange(len(rows)).repeat_interleave(counts)
    place = (torch.arange(len(of_run)) - (counts.cumsum(0) - counts)[of_run]) * PIECE
    found = torch.tensor(rows).T[:, of_run]
    for row, each in zip(found, tensors, strict=False):
        if each is not None:  # that of the last run: all have as many bytes for a token
            row += _bytes(side, each, tokens[-1], place)
    return found


def _bytes(side: Tiles, tensor: Tensor, length: int, token: Tensor) -> Tensor:
    """How many bytes of the first head's ``tensor`` come before what is of ``token``."""
    size = tensor.numel() * tensor.element_size() // (tensor.shape[0] * tensor.shape[1] * length)
    if side.kind != "channel":
        return token * size
    # A block has its channels one after the other, and in each its tokens.
    inside = token % side.block
    each = side.num_bits * inside // 8 if tensor.dtype == torch.int32 else inside // side.group * 2
    return (token - inside) * size + each


def table_of(side: Tiles, device: torch.device, parts: int) -> Tensor | None:
    """Float16 values of a table, or of codebooks ``[H, 256, 64, 2]`` in which each of its parts is where
    ``place_of_part`` of the source has it for so many ``parts`` at once; contiguous."""
    if side.lut is None:
        return None
    lut = side.lut.to(device, torch.float16)
    return (lut.unflatten(1, (-1, 2, parts)).permute(0, 4, 2, 1, 3, 5) if side.kind == "product" else lut).contiguous()


@dataclass(frozen=True)
class Exact:
    """What is not in code, ``[B, H, tokens, D]`` each: the tokens after those in code, and sinks."""

    keys: Tensor
    values: Tensor
    sink_keys: Tensor | None = None
    sink_values: Tensor | None = None


class CodedAttention:
    """Attention over runs of coded keys and values and what is not in code after them; one launch, which can be
    captured in a CUDA graph."""

    def __init__(
        self, keys: Tiles, values: Tiles, tokens: tuple[Sequence[int], Sequence[int]], batch: int, heads: int,
        query_heads: int, *, device: torch.device, sinks: Tensor | None = None,
        signs: tuple[Tensor | None, Tensor | None] = (None, None), turns: Turns | None = None,
        splits: int | None = None, shape: Shape | None = None,
    ):  # fmt: skip
        """``tokens`` of all runs of keys and of values, multiples of 32. ``sinks`` int64 ``[B, S]``: tokens that are
        left out where they are (-1: none). ``signs`` float32 ``[D]``: keys or values in code are turned by them and a
        Hadamard matrix. ``turns``: keys in code are without RoPE, which turns all channels. ``splits``: blocks for each
        KV head (None: enough to fill the GPU). Tables that are one tensor are kept once. Raises UnsupportedError where
        sizes do not fit the kernel (see `fits`)."""
        group = query_heads // heads
        known = fits(keys, values, CHANNELS, group) and (turns is None or keys.kind == "table")
        if not known or any(each % PIECE for part in tokens for each in part):
            raise UnsupportedError(f"These codes, for {group} query heads a KV head, do not fit the kernel.")
        self.keys, self.values = keys, values  # whose memory the addresses point to
        self.batch, self.heads, self.query_heads, self.sinks = batch, heads, query_heads, sinks
        self.rotated, self.turned = (signs[0] is not None, signs[1] is not None), turns is not None
        self.same_table = keys.kind == values.kind == "table" and keys.lut is values.lut
        self.shape = self._shape(device, min(map(sum, tokens))) if shape is None else shape
        tiles, pieces = places(keys, values, tokens, self.shape.tile)
        count = tiles.shape[1]
        if splits is None:
            processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
            splits = max(1, processors * self.shape.blocks // (batch * heads))
        self.splits = min(splits, -(-count // self.shape.warps) + BLOCKS_OF_REST)
        inside, starts = (None, None) if turns is None else _turns(turns, sum(tokens[0]), self.shape.tile)
        center, spread = keys.affine or (None, None)
        rows = batch * query_heads
        self._tensors: dict[str, Tensor | None] = {
            "places": tiles.to(device), "pieces": pieces.to(device), "k_signs": signs[0], "v_signs": signs[1],
            "k_order": None if keys.order is None else keys.order.to(device),
            "k_table": table_of(keys, device, 8), "v_table": table_of(values, device, 4),
            "k_center": center, "k_spread": spread, "turns": inside, "starts": starts, "sinks": sinks,
            "part_out": torch.empty(rows, self.splits, CHANNELS, device=device),
            "part_lse": torch.empty(rows, self.splits, device=device),
            "arrived": torch.zeros(batch * heads, dtype=torch.int32, device=device),
        }  # fmt: skip
        places_of_starts = 0 if starts is None else starts.shape[1]
        self._sizes = count, heads, self.splits, pieces.shape[1], places_of_starts, sum(tokens[0]), sum(tokens[1])

    def _shape(self, device: torch.device, tokens: int) -> Shape:
        """The most warps for whose tables and corrections there is room; short tiles of products, of keys that are
        turned, and where the GPU has more warps than long ones."""
        about = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        most = getattr(about, "shared_memory_per_block_optin", MOST_SHARED)
        processors = getattr(about, "multi_processor_count", 1)
        short = self.turned or self.keys.kind == "product"
        short |= tokens // TILE * self.batch * self.heads < processors * Shape.warps
        blocked = self.keys.kind == "channel" or self.values.low_rank is not None
        sizes = [TILE] if blocked else [TILE // 2] if short else [TILE, TILE // 2]
        shapes = (Shape(warps, tile=tile) for warps in (8, 4) for tile in sizes)
        for self.shape in shapes:
            if self.program(torch.float32).shared_memory + STATIC_SHARED <= most:
                return self.shape
        raise UnsupportedError("Tables and corrections of these codes do not fit a block's shared memory.")

    def program(self, dtype: torch.dtype, exact: Exact | None = None) -> Program:
        """What is compiled for queries of ``dtype``."""
        return Program(
            code_of(self.keys), code_of(self.values), self.rotated, self.turned, self.keys.joined, self.same_table,
            self.query_heads // self.heads, dtype, dtype if exact is None else exact.keys.dtype,
            0 if self.sinks is None else self.sinks.shape[1], self.shape,
        )  # fmt: skip

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.splits, self.batch * self.heads, 1

    def arguments(self, query: Tensor, scaling: float, exact: Exact | None, out: Tensor, lse: Tensor) -> Arguments:
        theirs = [None] * 4 if exact is None else [exact.keys, exact.values, exact.sink_keys, exact.sink_values]
        tensors = query, out, lse, *self._tensors.values(), *theirs
        pointers = [0 if each is None else each.data_ptr() for each in tensors]
        *sizes, k_coded, v_coded = self._sizes
        length = k_coded + (0 if exact is None else exact.keys.shape[2])
        return Arguments(*pointers, *sizes, k_coded, v_coded, length, scaling * LOG2E)

    def __call__(self, query: Tensor, scaling: float, exact: Exact | None = None) -> tuple[Tensor, Tensor]:
        """``query [B, Hq, D]``; the result ``[B, Hq, D]`` in its dtype and the log-sum-exp float32 ``[B, Hq]``. All
        tensors are contiguous."""
        program = self.program(query.dtype, exact)
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        index = query.device.index if query.device.index is not None else torch.cuda.current_device()
        stream = torch.cuda.current_stream(query.device).cuda_stream
        given = self.arguments(query, scaling, exact, out, lse)
        kernel(index, program)(self.grid, program.threads, given, stream)
        return out, lse


def _turns(turns: Turns, tokens: int, tile: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of two channels at each place of a tile, float16 ``[tile, 2 * TURN_WORDS]``, and of the first
    positions of all tiles, float32 ``[B, tiles, 32, 2, 2]``, as the kernel finds them."""
    inside, starts = turns.tables(CHANNELS, tile, 0, -(-tokens // tile) * tile, 1)  # [1, 2, tile, D]
    inside, starts = (each[..., : CHANNELS // 2].unflatten(-1, (-1, 2)) for each in (inside[0], starts))
    halves = inside.permute(1, 2, 0, 3).reshape(tile, 2, CHANNELS // 2)  # the other channels turn with these
    gaps = torch.nn.functional.pad(halves, (0, TURN_WORDS - CHANNELS // 2))
    turned = starts.movedim(-2, 2).unflatten(2, (4, 8)).transpose(2, 3).flatten(2, 3)
    return gaps.flatten(1).contiguous(), turned.contiguous()
