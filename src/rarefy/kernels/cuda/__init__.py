"""Kernels in CUDA C++, compiled at first use by the compiler that PyTorch brings along, and the layouts they read."""

from rarefy.kernels.cuda import columns
from rarefy.kernels.cuda.linear import ACTIVATIONS, available, status
from rarefy.kernels.cuda.prepared import Prepared, prepare
from rarefy.kernels.prepared import NotCovered, decode, linear

__all__ = ["ACTIVATIONS", "NotCovered", "Prepared", "available", "columns", "decode", "linear", "prepare", "status"]
