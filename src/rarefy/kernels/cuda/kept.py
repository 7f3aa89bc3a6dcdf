"""Weights of which some are kept: what their kernels (``groups.cu``, ``masked.cu``) are told, their launch, and where
what is kept lies."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rarefy import packing
from rarefy.kernels.cuda import driver, layout
from rarefy.kernels.cuda.layout import TILE
from rarefy.kernels.cuda.program import TYPES, index_of
from rarefy.kernels.prepared import NotCovered

GROUPS, MASKED = (Path(__file__).with_name(name) for name in ("groups.cu", "masked.cu"))


class SparseArguments(ctypes.Structure):
    """``Arguments`` of ``groups.cu`` and ``masked.cu``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "codes scale zero bitmap places bases row_ptr x y".split()),
        *((name, ctypes.c_int) for name in "rows columns words tokens stride groups".split()),
        ("multiplier", ctypes.c_float),
    ]


@dataclass(frozen=True)
class SparseCode:
    """Weights of which a bitmap says what is kept: groups of columns (``whole_groups``) or single ones, of every four
    neighbours two (``two_of_four``), in ``bits`` or as ``values`` of 16 bits. Other names as in ``Code``."""

    bits: int
    group: int
    scale: torch.dtype | None
    zero: torch.dtype | None = None
    center: int = 0
    values: torch.dtype | None = None
    whole_groups: bool = False
    two_of_four: bool = False

    @property
    def warps(self) -> int:
        """Of a block."""
        return 4 if self.whole_groups else 16

    @property
    def source(self) -> Path:
        return GROUPS if self.whole_groups else MASKED

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "rarefy_two_of_four" if self.two_of_four else f"rarefy_{self.source.stem}"

    def definitions(self, tokens: int, half: bool) -> dict[str, int]:
        """The macros of the source."""
        return {
            "BITS": self.bits, "VALUES": TYPES[self.values], "GROUP": self.group, "SCALE": TYPES[self.scale],
            "ZERO": TYPES[self.zero], "CENTER": self.center, "TOKENS": tokens, "WARPS": self.warps,
            "X_HALF": int(half), "HALF": int(half or not self.whole_groups),
        }  # fmt: skip

    def shared_memory(self, tokens: int, columns: int) -> int:
        """Bytes of a block."""
        if self.two_of_four:
            return 64 + tokens * 2 * columns
        if not self.whole_groups:
            return self.warps * 512 + tokens * 64 * -(-columns // 32)
        pieces = -(-columns // 16)
        totals = 0 if self.zero is None else -(-tokens * pieces // 4) * 16
        return tokens * pieces * 32 + totals + self.warps * tokens * 64

    def grid(self, rows: int, most: int) -> tuple[int, int, int]:
        """Blocks: one for 16 rows, or ``most`` of them, which take row after row."""
        if self.whole_groups:
            return -(-rows // TILE), 1, 1
        return min(most, -(-rows // self.warps)), 1, 1


def arguments(tensors: Mapping[str, Tensor | None], x: Tensor, y: Tensor, multiplier: float) -> SparseArguments:
    """``codes``, ``scale``, ``zero``, ``bitmap [rows, words]`` or ``places`` and ``bases``, ``row_ptr [rows + 1]`` of
    what is kept, ``x [tokens, columns]`` and ``y [tokens, rows]``."""
    bitmap, scale = tensors.get("bitmap"), tensors.get("scale")
    names = ("codes", "scale", "zero", "bitmap", "places", "bases", "row_ptr")
    pointers = [0 if (own := tensors.get(name)) is None else own.data_ptr() for name in names]
    groups = scale.shape[1] if scale is not None and scale.dim() == 2 else 1
    if tensors.get("row_ptr") is None:  # as many chunks of kept groups in each row
        groups = scale.shape[0] // y.shape[1] if scale is not None else 0
    sizes = (y.shape[1], x.shape[1], 0 if bitmap is None else bitmap.shape[1], x.shape[0], x.stride(0), groups)
    return SparseArguments(*pointers, x.data_ptr(), y.data_ptr(), *sizes, multiplier)


def at_once(tokens: int) -> int:
    """For how many tokens a kernel of kept weights is compiled."""
    return 1 << (tokens - 1).bit_length()


@functools.cache
def _kernel(device: int, code: SparseCode, tokens: int, half: bool, shared: int) -> driver.Kernel:
    macros = [f"-D{macro}={value}" for macro, value in code.definitions(tokens, half).items()]
    with torch.cuda.device(device):
        return driver.Kernel(code.source, code.entry, macros, shared)


def product(code: SparseCode, given: SparseArguments, half: bool, device: torch.device, overlap: bool = False) -> None:
    """The product with what is kept, on the current stream of ``device``."""
    tokens = at_once(given.tokens)
    program = _kernel(index_of(device), code, tokens, half, code.shared_memory(tokens, given.columns))
    most = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    stream = torch.cuda.current_stream(device).cuda_stream
    program(code.grid(given.rows, most), 32 * code.warps, given, stream, overlap)


# ---- Where what is kept lies.


def put_places(groups: Tensor, size: int, columns: int) -> dict[str, Tensor]:
    """The numbers of pieces of 16 columns, for groups ``[chunks, groups of a chunk]``: a byte each, where there are
    more than 256 above a number of 16 bits for the chunk."""
    each = size // layout.PIECE
    pieces = (groups.unsqueeze(-1) * each + torch.arange(each, device=groups.device)).flatten(1)
    if columns <= 256 * layout.PIECE:
        return {"places": pieces.to(torch.uint8)}
    base = pieces[:, :1]
    pieces = (pieces - base).clamp(min=0)  # what fills up a chunk is zero
    if pieces.numel() and int(pieces.max()) > 255:
        raise NotCovered("kept groups so few that eight of them lie 4,096 columns apart")
    return {"places": pieces.to(torch.uint8), "bases": base.squeeze(1).to(torch.int16)}


def kept_of(tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of a term of GROUPS: which are kept ``[rows, groups]``, and of these codes uint8 ``[kept, size]``, scales and
    zeros."""
    zeros, bases, size = tensors.get("zero_point"), tensors.get("bases"), numbers["group_size"]
    pieces = tensors["places"].to(torch.int64)
    if bases is not None and bases.numel():
        pieces = pieces + (bases.to(torch.int64) & 0xFFFF).unsqueeze(1)
    own = [
        pieces[:, :: size // layout.PIECE], tensors["scale"],
        *([zeros] if zeros is not None and zeros.numel() else []),
    ]  # fmt: skip
    counts = tensors["starts"].to(torch.int64).diff()
    groups, (first, *found) = layout.unpack_kept(tensors["codes"], own, counts, size)
    chosen = torch.zeros(counts.numel(), numbers["columns"] // size, dtype=torch.bool, device=counts.device)
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    chosen[row, first // (size // layout.PIECE)] = True
    return chosen, groups, found[0], found[1] if len(found) > 1 else None


def starts_of(bitmap: Tensor, pattern: str, stride: int, columns: int) -> Tensor:
    """Where each row's kept weights start: beside each other, or ``stride`` apart where all rows keep as many."""
    if pattern == "bitmap":
        counts = packing.unpack_bitmap(bitmap, columns).sum(1)
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return torch.arange(bitmap.shape[0] + 1, device=bitmap.device) * stride


def is_two_of_four(pattern: str, block: list[int], bits: int, size: int, columns: int) -> int:
    """Whether eight kept weights are of 16 neighbouring columns, all of one group of ``size``."""
    return int(pattern != "bitmap" and list(block) == [2, 4] and bits >= 4 and columns % 16 == size % 16 == 0)
