"""Attention of one new token over coded keys and values by ``attend.cu``: what it is compiled for, and its launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rarefy.core.errors import UnsupportedError
from rarefy.kernels.coded import KINDS, Tiles
from rarefy.kernels.cuda import driver

SOURCE = Path(__file__).with_name("attend.cu")
TILE, CHANNELS, MOST_HEADS = 128, 128, 8
QUERIES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
COPIES = 32  # of a table, one for each lane


@dataclass(frozen=True)
class Shape:
    """``warps`` of a block, ``blocks`` of a multiprocessor, and eighths of a tile that are loaded ahead."""

    warps: int = 8
    blocks: int = 1
    depth: int = 8


@dataclass(frozen=True)
class Code:
    """How keys or values are stored; names as in ``Tiles``."""

    kind: str
    num_bits: int
    group: int
    scale: bool
    offset: bool

    @property
    def table(self) -> int:
        """Bytes of the table as the kernel reads it."""
        if self.kind == "product":
            return 4 * CHANNELS // 2 << 8
        return 4 * COPIES << 2 * self.num_bits if self.kind == "table" else 0

    @property
    def scales(self) -> int:
        """Bytes of a tile's scales and zeros."""
        one = 2 * TILE * (CHANNELS // self.group) if self.kind in ("channel", "token") else 2 * TILE
        return one * (self.scale + self.offset)


def fits(keys: Tiles, values: Tiles, channels: int, run_tokens: int, heads: int) -> bool:
    """Whether the kernel can read these tiles, for so many query heads over one of them."""
    if channels != CHANNELS or run_tokens % TILE or heads > MOST_HEADS or values.kind == "channel":
        return False
    return all(_fits(side) for side in (keys, values))


def _fits(side: Tiles) -> bool:
    if side.outliers is not None or side.low_rank is not None or side.affine is not None or side.joined:
        return False
    match side.kind:
        case "channel":
            return side.block == TILE and side.group in (32, 64, 128) and side.num_bits in (2, 3, 4, 8)
        case "token":
            return side.group in (32, 64, 128) and side.num_bits in (2, 3, 4, 8)
        case "table":
            return len(side.runs[0]) > 1 and side.num_bits in (2, 3, 4)
        case "product":
            return side.num_bits == 8 and side.lut is not None and side.lut.shape[-1] == 2
    return False


def code_of(side: Tiles) -> Code:
    tensors = len(side.runs[0])
    group = side.group if side.kind in ("channel", "token") else CHANNELS
    return Code(side.kind, side.num_bits, group, tensors > 1, tensors > 2)


class Arguments(ctypes.Structure):
    """``Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "query places k_table v_table sinks part_out part_lse out lse arrived".split()),
        *((name, ctypes.c_int) for name in "tiles heads splits".split()),
        ("scaling", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True)
class Program:
    """One compiled form of the kernel."""

    keys: Code
    values: Code
    same_table: bool
    group_heads: int
    query: torch.dtype
    sinks: int
    shape: Shape

    def definitions(self) -> dict[str, int]:
        """The macros of the source."""
        found = {
            "SAME_TABLE": int(self.same_table), "GROUP_HEADS": self.group_heads, "QUERY": QUERIES[self.query],
            "SINKS": self.sinks, "WARPS": self.shape.warps, "BLOCKS": self.shape.blocks, "DEPTH": self.shape.depth,
            "HALF": 1, "K_SCALE": int(self.keys.scale), "K_OFFSET": int(self.keys.kind == "table" and self.keys.offset),
            "V_OFFSET": int(self.values.kind == "table" and self.values.offset),
        }  # fmt: skip
        for prefix, code in (("K", self.keys), ("V", self.values)):
            found |= {f"{prefix}_KIND": KINDS[code.kind], f"{prefix}_BITS": code.num_bits, f"{prefix}_GROUP": code.group}
        return found

    @property
    def shared_memory(self) -> int:
        """Bytes of a block."""
        tables = self.keys.table + (0 if self.same_table else self.values.table)
        scales = 2 * self.shape.warps * (self.keys.scales + self.values.scales)
        return max(tables + scales, self.shape.warps * 4 * MOST_HEADS * (CHANNELS + 2))

    @property
    def threads(self) -> int:
        return 32 * self.shape.warps


@functools.cache
def kernel(device: int, program: Program) -> driver.Kernel:
    """Compiled once in a process. Raises UnsupportedError where that fails."""
    macros = [f"-D{macro}={value}" for macro, value in program.definitions().items()]
    with torch.cuda.device(device):
        return driver.Kernel(SOURCE, "rarefy_attend", macros, program.shared_memory)


def places(keys: Tiles, values: Tiles, run_tokens: int) -> Tensor:
    """Addresses int64 ``[8, tiles]`` of the first head's codes, scales and zeros for each 128 tokens, keys before
    values, and how many tokens are from one head to the next."""
    rows = [*_addresses(keys, run_tokens), *_addresses(values, run_tokens)]
    return torch.stack([rows[n] for n in (0, 1, 2, 4, 5, 6, 3, 7)])


def _addresses(side: Tiles, run_tokens: int) -> Iterator[Tensor]:
    tile = torch.arange(run_tokens // TILE) * TILE
    bases, pitches, lengths = [], [], []
    for number, run in enumerate(side.runs):
        skip, length = side.spans[number] if side.spans else (0, run_tokens)
        tensors: list[Tensor | None] = [*run, *[None] * (3 - len(run))]
        sizes = [0 if each is None else each.numel() * each.element_size() // (each.shape[0] * each.shape[1] * length)
                 for each in tensors]  # fmt: skip
        bases.append([0 if each is None else each.data_ptr() + skip * size
                      for each, size in zip(tensors, sizes, strict=True)])  # fmt: skip
        pitches.append(sizes)
        lengths.append(length)
    base, pitch = torch.tensor(bases), torch.tensor(pitches)  # [runs, 3]
    yield from (base[:, :, None] + pitch[:, :, None] * tile).permute(1, 0, 2).flatten(1)
    yield torch.tensor(lengths).repeat_interleave(len(tile))


def table_of(side: Tiles, device: torch.device) -> Tensor | None:
    """Float16 values of a table or a codebook, contiguous."""
    return None if side.lut is None else side.lut.to(device, torch.float16).contiguous()


class CodedAttention:
    """Attention over fixed runs of coded keys and values, as ``kernels/triton/decode_attention.py`` has it; one launch,
    which can be captured in a CUDA graph."""

    def __init__(
        self, keys: Tiles, values: Tiles, batch: int, heads: int, query_heads: int, channels: int, run_tokens: int, *,
        device: torch.device, sinks: Tensor | None = None, splits: int | None = None, shape: Shape | None = None,
    ):  # fmt: skip
        """``run_tokens``: tokens of each run. ``sinks`` int64 ``[B, S]``: tokens that are left out. ``splits``: blocks
        for each KV head (None: enough to fill the GPU). Raises UnsupportedError where sizes do not fit the kernel (see
        `fits`)."""
        group = query_heads // heads
        if not fits(keys, values, channels, run_tokens, group):
            raise UnsupportedError(f"{run_tokens} tokens of {channels} channels do not fit the kernel.")
        self.keys, self.values, self.shape = keys, values, shape or Shape()  # whose memory the addresses point to
        self.batch, self.heads, self.query_heads = batch, heads, query_heads
        tiles, pairs = len(keys.runs) * run_tokens // TILE, batch * heads
        if splits is None:
            processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
            splits = max(1, processors * self.shape.blocks // pairs)
        self.splits = min(splits, -(-tiles // self.shape.warps))
        self.same_table = keys.kind == values.kind == "table" and keys.num_bits == values.num_bits and _equal(keys, values)
        rows = batch * query_heads
        self._tensors: dict[str, Tensor | None] = {
            "places": places(keys, values, run_tokens).to(device), "k_table": table_of(keys, device),
            "v_table": table_of(values, device), "sinks": sinks,
            "part_out": torch.empty(rows, self.splits, channels, device=device),
            "part_lse": torch.empty(rows, self.splits, device=device),
            "out": torch.empty(batch, query_heads, channels, device=device),
            "lse": torch.empty(batch, query_heads, device=device),
            "arrived": torch.zeros(pairs, dtype=torch.int32, device=device),
        }  # fmt: skip
        self._sizes = tiles, heads, self.splits

    def program(self, dtype: torch.dtype) -> Program:
        """What is compiled for queries of ``dtype``."""
        sinks = self._tensors["sinks"]
        return Program(
            code_of(self.keys), code_of(self.values), self.same_table, self.query_heads // self.heads, dtype,
            0 if sinks is None else sinks.shape[1], self.shape,
        )  # fmt: skip

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.splits, self.batch * self.heads, 1

    def arguments(self, query: Tensor, scaling: float) -> Arguments:
        tensors = [0 if each is None else each.data_ptr() for each in self._tensors.values()]
        return Arguments(query.data_ptr(), *tensors, *self._sizes, scaling * 1.4426950408889634)

    def __call__(self, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """``query [B, Hq, D]``; the result float32 ``[B, Hq, D]`` and its log-sum-exp ``[B, Hq]``, overwritten by the
        next call."""
        query = query.contiguous()
        program = self.program(query.dtype)
        index = query.device.index if query.device.index is not None else torch.cuda.current_device()
        stream = torch.cuda.current_stream(query.device).cuda_stream
        kernel(index, program)(self.grid, program.threads, self.arguments(query, scaling), stream)
        return self.results

    @property
    def results(self) -> tuple[Tensor, Tensor]:
        out, lse = self._tensors["out"], self._tensors["lse"]
        assert out is not None and lse is not None
        return out, lse


def _equal(keys: Tiles, values: Tiles) -> bool:
    return keys.lut is values.lut or (keys.lut is not None and values.lut is not None and torch.equal(keys.lut, values.lut))
