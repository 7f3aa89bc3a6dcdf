"""Codes of keys or values by ``encode.cu``: what it is compiled for, and its launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from rarefy.core.errors import UnsupportedError
from rarefy.kernels.cuda import driver

SOURCE = Path(__file__).with_name("encode.cu")
KINDS = {"channel": 1, "token": 2, "norm": 3, "range": 4, "product": 5, "row spread": 6, "row range": 7, "float8": 8}
TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
CHANNELS, MINE, SPAN = (64, 128), 32, 128  # numbers of a thread, and tokens of a block of threads at most
NOT_FINITE, OVERFLOWS = 1, 2  # bits of what was wrong
TOKENS_OF_PRODUCTS, EACH_OF_PRODUCTS, PAIRS_OF_PRODUCTS, ENTRIES = 512, 4, 4, 256


@dataclass(frozen=True)
class Code:
    """What is stored. ``kind``: uniform codes with a scale and zero for ``group`` tokens of a ``channel`` (in blocks of
    ``block``) or channels of a ``token``; a table for vectors brought to one ``norm`` or ``range``; codebooks of two
    channels each (``product``); a table for rows of all ``heads`` with ``entries`` outliers, around centers of channels
    (``row spread``) or within a range (``row range``); 8-bit floats in E4M3 (``float8``). ``rotated``: vectors are
    turned by signs and a Hadamard matrix first."""

    kind: str
    num_bits: int
    channels: int
    group: int = 0
    block: int = 1
    rotated: bool = False
    heads: int = 1
    entries: int = 0
    source: ClassVar[Path] = SOURCE

    @property
    def fits(self) -> bool:
        """Whether the kernel knows it."""
        if self.channels not in CHANNELS or not 1 <= self.num_bits <= 8:
            return False
        if self.kind in ("product", "float8"):
            return self.num_bits == 8
        if self.kind in ("norm", "range"):
            return self.num_bits <= 4
        if self.rows:
            return self.num_bits <= 4 and self.width in (64, 128, 256, 512, 1024) and 0 < self.entries < self.width // 2
        length = self.block if self.kind == "channel" else self.channels
        whole = self.group in (32, 64, 128) and length % self.group == 0
        return whole and (self.kind == "token" or self.block in (32, 64) or self.block % SPAN == 0)

    @property
    def rows(self) -> bool:
        """Whether a token's numbers of all heads are one vector."""
        return self.kind in ("row spread", "row range")

    @property
    def width(self) -> int:
        """Numbers of a row of all heads."""
        return self.heads * self.channels

    @property
    def span(self) -> int:
        """Tokens of a block of threads."""
        if self.rows:
            return 128 * MINE // self.width
        if self.kind == "product":
            return TOKENS_OF_PRODUCTS
        return min(self.block, SPAN) if self.kind == "channel" else 128 * MINE // self.channels

    @property
    def threads(self) -> int:
        if self.kind == "product":
            return TOKENS_OF_PRODUCTS // EACH_OF_PRODUCTS
        return self.channels * self.span // MINE if self.kind == "channel" else 128

    @property
    def shared_memory(self) -> int:
        """Bytes of a block of threads."""
        return 16 * ENTRIES * PAIRS_OF_PRODUCTS if self.kind == "product" else 8 * self.threads

    def definitions(self, dtype: torch.dtype) -> dict[str, int]:
        """The macros of the source."""
        return {
            "KIND": KINDS[self.kind], "BITS": self.num_bits, "GROUP": self.group or self.channels, "BLOCK": self.block,
            "D": self.channels, "X": TYPES[dtype], "ROTATED": int(self.rotated), "HEADS": self.heads,
            "ENTRIES": self.entries, "INDEX_BYTES": 1 if self.width <= 256 else 2, "HALF": 1,
        }  # fmt: skip

    @property
    def entry(self) -> str:
        if self.rows:
            return "rarefy_encode_rows"
        return "rarefy_encode_products" if self.kind == "product" else "rarefy_encode"

    def grid(self, x: Tensor) -> tuple[int, int, int]:
        """Blocks of threads for ``x [B, H, tokens, D]``."""
        pairs = x.shape[0] if self.rows else x.shape[0] * x.shape[1]
        parts = self.channels // (2 * PAIRS_OF_PRODUCTS) if self.kind == "product" else 1
        return -(-x.shape[2] // self.span), pairs, parts


def fields(pointers: str) -> list[tuple[str, Any]]:
    """Of an encoder's arguments: pointers by name, then strides and sizes of what is encoded."""
    strides, counts = ("batch_stride", "head_stride"), ("tokens", "heads")
    kinds = {ctypes.c_void_p: pointers.split(), ctypes.c_longlong: strides, ctypes.c_int: counts}
    return [(name, kind) for kind, names in kinds.items() for name in names]


class Arguments(ctypes.Structure):
    """``Arguments`` of the source."""

    _fields_ = fields(
        "x source signs middles lut decoded center spread counts order codes scale zero values indices faults"
    )


@dataclass(frozen=True)
class Encoded:
    """``codes`` int32 ``[B, H, tokens * codes of a token / 32, bits]`` as streams, channels first in each block for
    ``channel``; ``scale`` and ``zero`` (or offset) float16 ``[B, H, tokens / block, channels, groups]`` or ``[B, H,
    tokens, groups]``; ``values`` float16 and ``indices`` ``[B, 1, tokens, entries]``; empty where there is none. H is 1
    for rows of all heads."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    values: Tensor
    indices: Tensor


def empty(code: Code, x: Tensor) -> Encoded:
    """Memory for the codes of ``x [B, H, tokens, D]``."""
    batch, heads, tokens, channels = x.shape
    if code.rows:
        heads, channels = 1, heads * channels
    numbers = tokens * channels // (2 if code.kind == "product" else 1)
    groups = {
        "channel": (tokens // code.block, channels, code.block // (code.group or 1)), "product": (0,),
        "row spread": (0,), "token": (tokens, channels // (code.group or channels)),
    }.get(code.kind, (tokens, 1))  # fmt: skip
    scale = x.new_empty(batch, heads, *groups, dtype=torch.float16)
    has_zero = code.kind in ("channel", "token", "range", "row range")
    codes = x.new_empty(batch, heads, numbers // 32, code.num_bits, dtype=torch.int32)
    values = x.new_empty(batch, heads, tokens, code.entries, dtype=torch.float16)
    indices = torch.empty_like(values, dtype=torch.uint8 if code.width <= 256 else torch.int16)
    return Encoded(codes, scale, torch.empty_like(scale) if has_zero else scale[:0], values, indices)


def check_strides(x: Tensor) -> None:
    """Raise UnsupportedError where kernels cannot read ``x [B, H, tokens, D]``."""
    if x.stride(3) != 1 or x.stride(2) != x.shape[3] or x.data_ptr() % 16:
        raise UnsupportedError("Tokens of keys and values have to follow each other in memory.")


TABLES = ("source", "signs", "middles", "lut", "decoded", "center", "spread", "counts", "order")


def values_of(x: Tensor, *tensors: Tensor | None) -> list[int]:
    """An encoder's arguments in the order of `fields`: addresses of ``x [B, H, tokens, D]`` and of ``tensors``, then
    what `fields` says of ``x``. Raises as `check_strides`."""
    check_strides(x)
    addresses = [0 if each is None else each.data_ptr() for each in (x, *tensors)]
    return [*addresses, x.stride(0), x.stride(1), x.shape[2], x.shape[1]]


def arguments(x: Tensor, to: Encoded, faults: Tensor, tables: Mapping[str, Tensor | None]) -> Arguments:
    """``tables``: those of `encode` by name."""
    beside = (tables.get(name) for name in TABLES)
    return Arguments(*values_of(x, *beside, to.codes, to.scale, to.zero, to.values, to.indices, faults))


class Encoder(Protocol):
    """What a kernel that encodes is compiled for, and how it is launched."""

    @property
    def source(self) -> Path: ...
    @property
    def entry(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def shared_memory(self) -> int: ...
    def grid(self, x: Tensor) -> tuple[int, int, int]: ...
    def __hash__(self) -> int: ...
    def definitions(self, dtype: torch.dtype) -> dict[str, int]: ...


@functools.cache
def kernel(device: int, code: Encoder, dtype: torch.dtype) -> driver.Kernel:
    """Compiled once in a process. Raises UnsupportedError where that fails."""
    macros = [f"-D{macro}={value}" for macro, value in code.definitions(dtype).items()]
    with torch.cuda.device(device):
        return driver.Kernel(code.source, code.entry, ["-fmad=false", *macros], code.shared_memory)


def launch(code: Encoder, x: Tensor, given: ctypes.Structure) -> None:
    """On the current stream of the device of ``x``."""
    index = x.device.index if x.device.index is not None else torch.cuda.current_device()
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernel(index, code, x.dtype)(code.grid(x), code.threads, given, stream)


def encode(code: Code, x: Tensor, faults: Tensor, **tables: Tensor | None) -> Encoded:
    """Codes of ``x [B, H, tokens, D]``, by one launch on the current stream.

    ``faults`` int32 ``[1]`` gets bits of what is wrong. Tables: ``source`` int32 ``[B, tokens]``, which token is read
    in the place of each (-1: zeros); float32 ``signs [D]`` of a rotation, ``middles`` between neighbours of a table,
    ``lut``, the table or of products `entries`, ``decoded``, what codes of rows stand for, ``center`` and ``spread [H *
    D]``, and what errors count when the largest are chosen, ``counts [H * D]``; int16 ``order [H, D]``, which channels
    of a head products take one after the other.
    """
    to = empty(code, x)
    launch(code, x, arguments(x, to, faults, tables))
    return to


def entries(codebook: Tensor, half: Tensor) -> Tensor:
    """Float32 ``[H, parts, 4, entries]`` of codebooks ``[H, parts, entries, 2]``: what two numbers are multiplied by,
    what is taken away from that (``half [H, parts, entries]``), and first in the last row the largest of each of
    these."""
    factors = torch.cat([codebook.float().mT, half.unsqueeze(-2)], -2)
    largest = torch.nn.functional.pad(factors.abs().amax(-1), (0, factors.shape[-1] - 3))
    return torch.cat([factors, largest.unsqueeze(-2)], -2).contiguous()
