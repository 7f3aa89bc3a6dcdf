"""Kernels of ``kernels/cuda`` run by this processor, a block after another; see emulator.h."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

from rarefy.kernels.cuda import program

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")


@functools.cache
def _library(folder: Path, macros: tuple[str, ...]) -> ctypes.CDLL:
    assert COMPILER is not None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{len(list(folder.iterdir()))}.so"
    given = [*macros, f'-DKERNEL_SOURCE="{program.SOURCE}"']
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w"]
    subprocess.run([COMPILER, *flags, *given, str(HERE / "emulated.cpp"), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def run(
    name: str, code: program.Code, tuning: program.Tuning, half: bool, given: program.Arguments,
    grid: tuple[int, int, int], folder: Path,
) -> None:  # fmt: skip
    """``rarefy_<name>`` of the source."""
    macros = [f"-D{macro}={value}" for macro, value in program.definitions(code, tuning, half).items()]
    library = _library(folder, (*macros, f"-DENTRY=rarefy_{name}"))
    library.run(ctypes.byref(given), *grid, tuning.threads, tuning.shared_memory(code))
