"""Native kernels for x86-64 processors: a C library (csrc/), the layouts it reads, and the op over both."""

from rarefy.kernels.cpu import columns
from rarefy.kernels.cpu.library import Status, available, status
from rarefy.kernels.cpu.linear import ACTIVATIONS, check, decode, linear
from rarefy.kernels.cpu.prepared import Prepared, prepare
from rarefy.kernels.prepared import NotCovered

__all__ = [
    "ACTIVATIONS", "NotCovered", "Prepared", "Status", "available", "check", "columns", "decode", "linear", "prepare",
    "status",
]  # fmt: skip
