"""Kernels of ``kernels/cuda`` run by this processor, a block after another; see emulator.h."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from rarefy.kernels.cuda import layout, program

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")


@functools.cache
def _library(folder: Path, macros: tuple[str, ...]) -> ctypes.CDLL:
    assert COMPILER is not None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{abs(hash(macros))}.so"
    given = [*macros, f'-DKERNEL_SOURCE="{program.SOURCE}"', "-DENTRY=rarefy_linear"]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w"]
    subprocess.run([COMPILER, *flags, *given, str(HERE / "emulated.cpp"), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def linear(
    code: program.Code, tuning: program.Tuning, x: Tensor, codes: Tensor, scale: Tensor | None = None,
    zero: Tensor | None = None, table: Tensor | None = None, *, rows: int, folder: Path,
) -> Tensor:  # fmt: skip
    """``x [M, K]`` times the weight of canonical ``codes [rows, K]``, ``scale`` and ``zero [rows, groups]``."""
    half = x.dtype == torch.float16
    packed = layout.pack_codes(codes, code.bits, code.span, code.table)
    pairs = [None if each is None else layout.pack_pairs(each) for each in (scale, zero)]
    pair_table = None if table is None else layout.pair_table(table)
    y = torch.full((x.shape[0], rows), torch.nan, dtype=x.dtype)
    partial = torch.full((tuning.split, x.shape[0], rows), torch.nan)
    across, along, deep = program.grid(tuning, rows, x.shape[0])
    arrived = torch.zeros(across * deep, dtype=torch.int32)
    given = program.arguments(code, packed, *pairs, pair_table, x, y, partial, arrived)
    macros = tuple(f"-D{name}={value}" for name, value in program.definitions(code, tuning, half).items())
    library = _library(folder, macros)
    library.run(ctypes.byref(given), across, along, deep, tuning.threads, tuning.shared_memory(code))
    assert not arrived.any()
    return y
