"""Which native kernels there are for a device: the C library on processors, CUDA or Triton on GPUs."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rarefy.kernels import cpu, cuda
from rarefy.kernels.prepared import NotCovered, Prepared, decode, linear

__all__ = ["NotCovered", "Prepared", "decode", "engine", "linear", "takes"]

_ENGINES: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda}


def engine(device: torch.device) -> ModuleType | None:
    """The package of kernels for ``device``, with ``prepare`` and ``ACTIVATIONS``; None where there is none."""
    found = _ENGINES.get(device.type)
    return found if found is not None and found.available() else None


def takes(x: Tensor) -> bool:
    """Whether there are native kernels for activations like ``x``."""
    found = engine(x.device)
    return found is not None and x.dtype in found.ACTIVATIONS
