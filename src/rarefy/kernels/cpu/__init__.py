"""Native kernels for x86-64 processors: a C library (csrc/), the layouts it reads, and the op over both."""

from rarefy.kernels.cpu.library import Status, available, status
from rarefy.kernels.cpu.linear import ACTIVATIONS, check, decode, linear
from rarefy.kernels.cpu.prepared import NotCovered, Prepared, prepare

__all__ = [
    "ACTIVATIONS", "NotCovered", "Prepared", "Status", "available", "check", "decode", "linear", "prepare", "status",
]  # fmt: skip
