"""Kernels of a model's compressed layers, tried on the GPU where it lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from rarefy.core.errors import UnsupportedError
from rarefy.core.progress import track
from rarefy.formats.terms import Term
from rarefy.kernels.cuda import measure, tuning
from rarefy.kernels.cuda.linear import problem_of
from rarefy.layers.linear import CompressedLinear
from rarefy.layers.swap import compressed


def problems(model: nn.Module) -> Iterator[measure.Problem]:
    """One product for every kind and size of term that CUDA kernels read."""
    seen = set()
    for _, module in compressed(model):
        if not isinstance(module, CompressedLinear):
            continue
        module.prepare_()
        for term in module.terms:
            if isinstance(term, Term) and (made := term.prepared) is not None and made.device.type == "cuda":
                problem = problem_of(made)
                if problem is None or (key := (problem.code, problem.rows, problem.columns)) in seen:
                    continue
                seen.add(key)
                yield problem


def tune(model: nn.Module, tokens: Sequence[int], dtype: torch.dtype, most: int = 64) -> list[dict[str, object]]:
    """Entries of ``kernels/cuda/tuning.py`` for the layers of ``model``, which lies on a GPU.

    Raises UnsupportedError where no layer has a kernel.
    """
    found = list(problems(model))
    if not found:
        raise UnsupportedError("No compressed layer of this model is read by a CUDA kernel on this device.")
    entries = []
    for problem in track(found, "tuning", total=len(found)):
        for count in tokens:
            x = torch.randn(count, problem.columns, device=problem.tensors["codes"].device, dtype=dtype)
            best, times = measure.fastest(problem, x, most)
            entry = tuning.entry(problem.code, problem.rows, problem.columns, count, best)
            entries.append({**entry, "microseconds": round(times[best], 2)})
    return entries
