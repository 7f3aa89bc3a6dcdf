"""The native library: found beside this file or in an installed copy of the package, opened once, called by ctypes.

``RAREFY_CPU`` chooses an instruction set (``scalar``, ``avx2``, ``avx512``), or ``torch`` to leave the library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rarefy.core.errors import OptionError

ABI = 5
INSTRUCTION_SETS = ("scalar", "avx2", "avx512")
VARIABLE = "RAREFY_CPU"
FILE = "librarefy_cpu.so"


@dataclass(frozen=True)
class Status:
    """Whether the native library is in use: ``path`` and ``instructions``, or the ``reason`` why not."""

    path: str | None = None
    instructions: str | None = None
    reason: str | None = None


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The open library, or None where ``status().reason`` says why. Raises OptionError for an unknown RAREFY_CPU."""
    return _open()[0]


def available() -> bool:
    """Whether the native library is in use."""
    return library() is not None


def status() -> Status:
    """What ``rarefy info`` tells of the library."""
    loaded, reason = _open()
    if loaded is None:
        return Status(reason=reason)
    return Status(path=str(loaded._name), instructions=instructions())


def instructions() -> str:
    """The instruction set in use. Only with a library."""
    return str(_loaded().rarefy_instructions().decode())


def supported() -> list[str]:
    """The instruction sets that this processor and the library have."""
    if not available():
        return []
    before = instructions()
    found = [name for name in INSTRUCTION_SETS if _loaded().rarefy_select(name.encode()) == 0]
    _loaded().rarefy_select(before.encode())
    return found


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Use another instruction set within the context. Raises OptionError when this processor or library lacks it."""
    before = instructions()
    if _loaded().rarefy_select(name.encode()) != 0:
        raise OptionError(f"The instruction set '{name}' is not to be had here; choose one of {supported()}.")
    try:
        yield
    finally:
        _loaded().rarefy_select(before.encode())


def follow_threads() -> None:
    """Let the library's pool have as many threads as torch has."""
    _set_threads(torch.get_num_threads())


@functools.lru_cache(maxsize=1)
def _set_threads(count: int) -> None:
    """Only where it is another number than the last time: asking costs more than knowing."""
    _loaded().rarefy_threads(count)


def read(data: torch.Tensor) -> int:
    """Read a contiguous tensor on the CPU as fast as one thread can, for measurements."""
    return int(_loaded().rarefy_read(data.data_ptr(), data.numel() * data.element_size()))


def _loaded() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise OptionError(f"There is no native library: {status().reason}.")
    return loaded


@functools.lru_cache(maxsize=1)
def _open() -> tuple[ctypes.CDLL | None, str | None]:
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "torch":
        return None, f"{VARIABLE}=torch asks for the kernels in torch"
    if wanted and wanted not in INSTRUCTION_SETS:
        raise OptionError(f"{VARIABLE}='{wanted}' is unknown; use one of {', '.join(INSTRUCTION_SETS)}, or torch.")
    path = _find()
    if path is None:
        return None, "it was not built; install rarefy from source on x86-64 Linux with a C++ compiler"
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.rarefy_abi.restype = ctypes.c_int32
        abi = int(loaded.rarefy_abi())
    except (OSError, AttributeError) as failure:
        return None, f"'{path}' cannot be opened ({failure})"
    if abi != ABI:
        return None, f"'{path}' is of interface {abi}, this rarefy needs {ABI}; install rarefy again"
    _declare(loaded)
    have = str(loaded.rarefy_instructions().decode())
    if wanted and have != wanted:
        return None, f"{VARIABLE}={wanted} asks for instructions that this processor does not have"
    return loaded, None


def _find() -> Path | None:
    """Beside this file, or, in an editable install of a clean source tree, where the package was installed."""
    places = [Path(__file__).parent, *(Path(entry) / "rarefy" / "kernels" / "cpu" for entry in sys.path if entry)]
    return next((place / FILE for place in places if (place / FILE).is_file()), None)


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, whole, number, text, size = (
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_char_p, ctypes.c_size_t,
    )  # fmt: skip
    signatures = {
        "rarefy_instructions": (text, []),
        "rarefy_select": (number, [text]),
        "rarefy_threads": (number, [number]),
        "rarefy_check": (number, [text, text, size]),
        "rarefy_linear": (
            number,
            [text, number, pointer, whole, pointer, whole, number, whole, number, text, size],
        ),
        "rarefy_decode": (number, [text, number, pointer, text, size]),
        "rarefy_pack_codes": (None, [pointer, pointer, whole, whole, number]),
        "rarefy_unpack_codes": (None, [pointer, pointer, whole, whole, number]),
        "rarefy_attend_bytes": (whole, [whole] * 5),
        "rarefy_attend": (
            number,
            [text, *[whole, pointer], *[whole] * 4, ctypes.c_float, pointer, whole, *[pointer] * 3, whole, text, size],
        ),
        "rarefy_blocks_bytes": (whole, [pointer]),
        "rarefy_attend_blocks": (number, [pointer, pointer, whole, text, size]),
        "rarefy_pack_entries": (None, [pointer, pointer, pointer, whole, whole, pointer, pointer]),
        "rarefy_unpack_entries": (None, [pointer, pointer, pointer, whole, whole, pointer, pointer]),
        "rarefy_round_columns": (None, [pointer, number]),
        "rarefy_search_ranges": (None, [pointer]),
        "rarefy_fit_around": (None, [pointer, *[number] * 6]),
        "rarefy_read": (ctypes.c_uint64, [pointer, whole]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
