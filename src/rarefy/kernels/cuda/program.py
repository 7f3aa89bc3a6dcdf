"""One compiled form of ``linear.cu``: what it is told at compile time, its arguments and its launch."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.kernels.cuda import driver
from rarefy.kernels.cuda.layout import TILE, step_of

SOURCE = Path(__file__).with_name("linear.cu")
NUMBERS = {None: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4}  # in the source


@dataclass(frozen=True)
class Code:
    """What is stored. ``group``: columns of a scale, 0 for the whole row; ``table``: codes are looked up in one table
    of 16-bit numbers; ``scale``, ``zero``: their types; without a zero, ``center`` is the code that means zero."""

    bits: int
    group: int = 0
    span: int = 8
    table: bool = False
    scale: torch.dtype | None = torch.float16
    zero: torch.dtype | None = None
    center: int = 0

    @property
    def step(self) -> int:
        """Columns that a warp takes at once."""
        return step_of(self.bits)


@dataclass(frozen=True)
class Tuning:
    """How the work is cut up. A warp computes ``16 * tiles`` rows for ``8 * tokens`` tokens; a block has ``across``
    warps over rows times ``along`` warps over columns; ``split`` blocks share a row's columns. ``depth`` steps of
    weights are loaded ahead into registers. ``stages`` steps of activations go through shared memory (0: read from
    memory)."""

    tiles: int = 1
    tokens: int = 1
    across: int = 1
    along: int = 8
    depth: int = 2
    stages: int = 0
    split: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.across * self.along

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return TILE * self.tiles * self.across

    def shared_memory(self, code: Code) -> int:
        """Bytes of a block."""
        width = 8 * self.tokens
        table = 32 * 4 << 2 * code.bits if code.table else 0
        staged = self.stages * width * (2 * code.step * self.along + 64)
        return table + max(staged, 4 * self.along * width * (self.rows + 4))


class Arguments(ctypes.Structure):
    """``Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "table", "x", "y", "partial", "arrived")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "steps", "groups", "tokens", "stride")),
        ("multiplier", ctypes.c_float),
    ]


def definitions(code: Code, tuning: Tuning, half: bool) -> dict[str, int]:
    """The macros of the source."""
    found = {field.name.upper(): int(getattr(tuning, field.name)) for field in fields(tuning)}
    found.update(
        BITS=code.bits, GROUP=code.group, SPAN=code.span, STEP=code.step, TABLE=int(code.table), CENTER=code.center,
        SCALE=NUMBERS[code.scale], ZERO=NUMBERS[code.zero], HALF=int(half), STAGED=int(tuning.stages > 0),
    )  # fmt: skip
    return found


def arguments(
    code: Code, codes: Tensor, scale: Tensor | None, zero: Tensor | None, table: Tensor | None,
    x: Tensor, y: Tensor, partial: Tensor | None, arrived: Tensor | None, multiplier: float = 1.0,
) -> Arguments:  # fmt: skip
    """``codes [tiles, steps, loads, 32, 4]``, ``scale`` and ``zero [tiles, groups, 8, 2]`` of layout.py, ``x [M, K]``,
    ``y [M, N]``; what is absent is a null pointer."""
    groups = 1 if scale is None else scale.shape[1]
    pointers = [0 if each is None else each.data_ptr() for each in (codes, scale, zero, table, x, y, partial, arrived)]
    return Arguments(
        *pointers, y.shape[1], x.shape[1], codes.shape[1], groups, x.shape[0], x.stride(0), multiplier,
    )  # fmt: skip


def grid(tuning: Tuning, rows: int, tokens: int) -> tuple[int, int, int]:
    """Blocks over rows, columns and tokens."""
    return -(-rows // tuning.rows), tuning.split, -(-tokens // (8 * tuning.tokens))


@functools.cache
def kernel(device: int, code: Code, tuning: Tuning, half: bool) -> driver.Kernel:
    """Compiled for ``device``, once in a process. Raises UnsupportedError where that fails."""
    macros = [f"-D{name}={value}" for name, value in definitions(code, tuning, half).items()]
    with torch.cuda.device(device):
        return driver.Kernel(SOURCE, "rarefy_linear", macros, tuning.shared_memory(code))


def launch(
    code: Code, tuning: Tuning, given: Arguments, half: bool, device: torch.device, overlap: bool = False
) -> None:
    """Run on the current stream of ``device``."""
    program = kernel(_index(device), code, tuning, half)
    stream = torch.cuda.current_stream(device).cuda_stream
    program(grid(tuning, given.rows, given.tokens), tuning.threads, given, stream, overlap)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def workspace(tuning: Tuning, rows: int, tokens: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Memory for blocks that share columns: partial sums, and counters that are zero before and after."""
    if tuning.split == 1:
        return None, None
    across, _, deep = grid(tuning, rows, tokens)
    partial = torch.empty(tuning.split, tokens, rows, dtype=torch.float32, device=device)
    return partial, _counters(device, across * deep)


_arrived: dict[Any, Tensor] = {}


def _counters(device: torch.device, count: int) -> Tensor:
    """Counters of this device and stream: kernels of a stream follow each other, and each leaves them at zero."""
    key = device, torch.cuda.current_stream(device).cuda_stream
    found = _arrived.get(key)
    if found is None or found.numel() < count:
        found = _arrived[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return found
