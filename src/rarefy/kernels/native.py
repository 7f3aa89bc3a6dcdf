"""Which native kernels there are for a device: the C library on processors, CUDA or Triton on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from rarefy.core.imports import when_imported
from rarefy.kernels import cpu, cuda
from rarefy.kernels import prepared as layouts
from rarefy.kernels.columns import compiled, fit_around, fits_around, round_columns, search_ranges
from rarefy.kernels.prepared import NotCovered, Prepared, decode

__all__ = [
    "NotCovered", "Prepared", "compiled", "decode", "engine", "fit_around", "fits_around", "linear", "round_columns",
    "search_ranges", "takes",
]  # fmt: skip

_ENGINES: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda}


def engine(device: torch.device) -> ModuleType | None:
    """The package of kernels for ``device``, with ``prepare`` and ``ACTIVATIONS``; None where there is none."""
    found = _ENGINES.get(device.type)
    return found if found is not None and found.available() else None


def linear(x: Tensor, terms: Sequence[Prepared], fast: bool = False) -> Tensor:
    """``kernels.prepared.linear``, by the shortest way there is on the device of ``x``."""
    own = cpu.linear if x.device.type == "cpu" else layouts.linear
    return own(x, terms, fast)  # type: ignore[arg-type]


def takes(x: Tensor) -> bool:
    """Whether there are native kernels for activations like ``x``."""
    return x.dtype in _activations(x.device.type)


def _activations(device: str) -> tuple[torch.dtype, ...]:
    """What a device's kernels take; a compiler asks instead of tracing how a library is looked for."""
    found = engine(torch.device(device))
    return () if found is None else tuple(found.ACTIVATIONS)


# The mark loads the compiler, which takes longer than all else that is imported here, and nobody else may want it.
when_imported("torch._dynamo", lambda: torch.compiler.assume_constant_result(_activations))
