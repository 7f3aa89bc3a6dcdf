"""Blocks of uniform codes with two corrections by ``encode_blocks.cu``: what it is compiled for, and its launch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.kernels.cuda.encode import CHANNELS, MINE, TYPES, fields, launch, values_of

SOURCE = Path(__file__).with_name("encode_blocks.cu")
LENGTHS, MOST_RANK = (32, 64, 128), 16


@dataclass(frozen=True)
class BlockCode:
    """Vectors are a ``channel`` over the ``block`` tokens or a ``token`` over its ``channels`` (``axis``): ``num_bits``
    codes, of which ``group`` share a scale and zero, ``entries`` stored errors of each vector, as many of which are
    left out of ranges at both ends together, and a matrix of ``rank`` by so many ``iterations``."""

    axis: str
    num_bits: int
    group: int
    block: int
    channels: int
    entries: int = 0
    rank: int = 0
    iterations: int = 1
    source: ClassVar[Path] = SOURCE
    entry: ClassVar[str] = "rarefy_encode_blocks"

    @property
    def length(self) -> int:
        """Numbers of a vector."""
        return self.block if self.axis == "channel" else self.channels

    @property
    def vectors(self) -> int:
        """How many a block has."""
        return self.channels if self.axis == "channel" else self.block

    @property
    def fits(self) -> bool:
        """Whether the kernel knows it."""
        sizes = self.channels in CHANNELS and self.block in LENGTHS and self.group in LENGTHS
        if not sizes or self.length % self.group or not 1 <= self.num_bits <= 8:
            return False
        return self.entries % 2 == 0 and self.entries // 2 <= (self.length - 1) // 2 and self.rank <= MOST_RANK

    @property
    def threads(self) -> int:
        return self.vectors * self.length // MINE

    @property
    def shared_memory(self) -> int:
        """Bytes of a block of threads."""
        return 4 * (self.block * (self.channels + 1) + self.rank * (self.block + self.channels))

    def grid(self, x: Tensor) -> tuple[int, int, int]:
        """Blocks of threads for ``x [B, H, tokens, D]``."""
        return x.shape[2] // self.block, x.shape[0] * x.shape[1], 1

    def definitions(self, dtype: torch.dtype) -> dict[str, int]:
        """The macros of the source."""
        return {
            "CHANNELS_APART": int(self.axis == "channel"), "BITS": self.num_bits, "GROUP": self.group,
            "BLOCK": self.block, "D": self.channels, "X": TYPES[dtype], "ENTRIES": self.entries, "RANK": self.rank,
            "ITERATIONS": self.iterations, "HALF": 1,
        }  # fmt: skip


class Arguments(ctypes.Structure):
    """``Arguments`` of the source."""

    _fields_ = fields("x source start codes scale zero values indices left right faults")


@dataclass(frozen=True)
class EncodedBlocks:
    """``codes`` int32 ``[B, H, N, numbers / 32, bits]``, ``scale`` and ``zero`` float16 ``[B, H, N, vectors, groups]``,
    ``values`` float16 and ``indices`` uint8 ``[B, H, N, vectors, entries]``, ``left`` ``[B, H, N, block, rank]`` and
    ``right`` ``[B, H, N, rank, D]`` float16, of N blocks."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    values: Tensor
    indices: Tensor
    left: Tensor
    right: Tensor


def empty(code: BlockCode, x: Tensor) -> EncodedBlocks:
    """Memory for the codes of ``x [B, H, tokens, D]``."""
    lead = *x.shape[:2], x.shape[2] // code.block

    def halves(*shape: int) -> Tensor:
        return x.new_empty(*lead, *shape, dtype=torch.float16)

    codes = x.new_empty(*lead, code.vectors * code.length // 32, code.num_bits, dtype=torch.int32)
    scale, values = halves(code.vectors, code.length // code.group), halves(code.vectors, code.entries)
    left, right = halves(code.block, code.rank), halves(code.rank, code.channels)
    indices = torch.empty_like(values, dtype=torch.uint8)
    return EncodedBlocks(codes, scale, torch.empty_like(scale), values, indices, left, right)


def arguments(
    x: Tensor, to: EncodedBlocks, faults: Tensor, start: Tensor | None = None, source: Tensor | None = None
) -> Arguments:
    """Of a launch; see `encode`."""
    beside = to.codes, to.scale, to.zero, to.values, to.indices, to.left, to.right
    return Arguments(*values_of(x, source, start, *beside, faults))


def encode(
    code: BlockCode, x: Tensor, faults: Tensor, *, start: Tensor | None = None, source: Tensor | None = None
) -> EncodedBlocks:
    """Whole blocks ``x [B, H, tokens, D]``, by one launch on the current stream. ``start`` float32 ``[D, rank]``: where
    the search for directions begins; ``faults`` and ``source`` as in `encode.encode`."""
    to = empty(code, x)
    launch(code, x, arguments(x, to, faults, start, source))
    return to
