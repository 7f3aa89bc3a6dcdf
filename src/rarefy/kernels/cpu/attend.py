"""Attention of a few queries over coded keys and values, by the native library. CPU only; see csrc/attend.h."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import FormatError
from rarefy.kernels.cpu.library import _loaded, available, follow_threads
from rarefy.kernels.cpu.prepared import BF16, F16, F32

KINDS = {"dense": 0, "channel": 1, "token": 2}
TYPES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
BITS = (2, 3, 4, 8)
STRETCH, WIDTH = 2048, 256  # most tokens of a stretch and channels of a head
_MESSAGE = 512

# rarefy_side of csrc/attend.h: 4 int32, 6 int64, 4 pointers; rarefy_stretch: 2 int64, 2 pointers, 2 int64.
_SIDE = struct.Struct("4i6q4P")
_STRETCH = struct.Struct("2q2P2q")


@dataclass(frozen=True)
class Half:
    """Keys or values of ``tokens`` tokens from the stretch's token ``first`` on: as ``numbers`` the codes, scale and
    zero, contiguous ``[B, H, ...]``, or plain numbers ``[B, H, ...]`` of at least as many tokens from ``skip`` on;
    ``kind`` as in csrc/attend.h. ``table`` float32 of
    ``2 ** num_bits`` entries; None: codes stand for themselves. ``added``: the zero is added after the scale."""

    kind: str
    first: int
    tokens: int
    numbers: tuple[Tensor, ...]
    num_bits: int = 16
    block: int = 1
    group: int = 1
    table: Tensor | None = None
    added: bool = False
    skip: int = 0


@dataclass(frozen=True)
class Stretch:
    """Tokens ``[first, first + tokens)``, which both lists cover without gaps; they may go beyond."""

    first: int
    tokens: int
    keys: tuple[Half, ...]
    values: tuple[Half, ...]


def fits(half: Half, channels: int) -> bool:
    """Whether the library can read this half, as csrc/attend.cpp checks it."""
    if half.kind == "dense":
        return half.numbers[0].dtype in TYPES
    per = 4 if half.num_bits == 8 else 8
    length = half.block if half.kind == "channel" else channels
    chunks = length // per
    if half.num_bits not in BITS or length % per or half.group % per or length % half.group:
        return False
    if half.table is not None and half.num_bits == 8:
        return False
    if not chunks or (16 % chunks and chunks % 16):
        return False
    rows = max(1, 16 // chunks)
    if half.kind == "channel":
        return half.tokens % half.block == 0 and channels % rows == 0 and length // half.group <= 16
    return half.tokens % rows == 0


def attend(stretches: Sequence[Stretch], query: Tensor, scaling: float, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` float32 ``[B, H, G, D]`` over all tokens of ``stretches`` but those in ``hidden`` int64
    ``[B, S]``: float32 of that shape, and the log-sum-exp ``[B, H, G]``. Raises FormatError where sizes are wrong."""
    batch, heads, group, channels = query.shape
    query = query.contiguous()
    tables: list[Tensor] = []
    halves = [half for each in stretches for side in (each.keys, each.values) for half in side]
    sides = ctypes.create_string_buffer(b"".join(_side(half, query, tables) for half in halves))
    at, packed = ctypes.addressof(sides), b""
    for each in stretches:
        middle = at + len(each.keys) * _SIDE.size
        packed += _STRETCH.pack(each.first, each.tokens, at, middle, len(each.keys), len(each.values))
        at = middle + len(each.values) * _SIDE.size
    hidden = torch.empty(batch, 0, dtype=torch.int64) if hidden is None else hidden.contiguous()
    out, lse = torch.empty_like(query), query.new_empty(batch, heads, group)
    follow_threads()
    size = _loaded().rarefy_attend_bytes(len(stretches), batch, heads, group, channels)
    memory = torch.empty(size + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    message = ctypes.create_string_buffer(_MESSAGE)
    failed = _loaded().rarefy_attend(
        packed, len(stretches), query.data_ptr(), batch, heads, group, channels, scaling, hidden.data_ptr(),
        hidden.shape[1], out.data_ptr(), lse.data_ptr(), memory.data_ptr() + start, size, message, _MESSAGE,
    )  # fmt: skip
    if failed:
        raise FormatError(f"{message.value.decode()}.")
    return out, lse


def _side(half: Half, query: Tensor, tables: list[Tensor]) -> bytes:
    """rarefy_side, of tensors whose sizes have been looked at; tables that it points to go into ``tables``."""
    batch, heads, _, channels = query.shape
    tokens = half.tokens
    codes, *rest = half.numbers
    if half.kind == "dense":
        return _plain(half, codes, batch * heads, channels)
    wanted = [tokens * channels * half.num_bits]
    each = codes.element_size() * 8
    wanted += [tokens * channels // half.group] * len(rest)
    for tensor, count, unit in zip(half.numbers, wanted, [each] + [1] * len(rest), strict=True):
        if tensor.numel() * unit != count * batch * heads or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise FormatError(
                f"Codes of {tokens} tokens of {heads} heads have {tensor.numel()} numbers, which is no such size."
            )
    if half.table is not None:
        table = half.table.float().repeat(16 // len(half.table))
    else:
        table = (torch.arange(16) % (1 << min(half.num_bits, 4))).float()
    tables.append(table)
    pairs = batch * heads
    return _SIDE.pack(
        KINDS[half.kind], half.num_bits, 0, half.added, half.first, half.tokens, half.block,
        half.group, codes.numel() * codes.element_size() // pairs, rest[0].numel() // pairs if rest else 0,
        codes.data_ptr(),
        rest[0].data_ptr() if rest else 0, rest[1].data_ptr() if len(rest) > 1 else 0, table.data_ptr(),
    )  # fmt: skip


def _plain(half: Half, numbers: Tensor, pairs: int, channels: int) -> bytes:
    tokens = numbers.numel() // (pairs * channels)
    if tokens < half.skip + half.tokens or not numbers.is_contiguous() or numbers.device.type != "cpu":
        raise FormatError(f"{half.skip + half.tokens} tokens are read of plain numbers for {tokens}.")
    size = numbers.element_size()
    return _SIDE.pack(
        KINDS["dense"], 16, TYPES[numbers.dtype], 0, half.first, half.tokens, 1, 1, tokens * channels * size, 0,
        numbers.data_ptr() + half.skip * channels * size, 0, 0, 0,
    )  # fmt: skip


__all__ = ["Half", "Stretch", "attend", "available", "fits"]
