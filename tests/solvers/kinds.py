"""Every way through the columns that a kernel may go, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from rarefy.formats.grids import IntegerGrid, LevelGrid
from rarefy.formats.patterns import NM, Bitmap
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms import Term
from rarefy.kernels import columns
from rarefy.saliency import obs
from rarefy.solvers.clip import ClipSearch
from rarefy.solvers.gptq import gptq
from rarefy.solvers.hessian import InverseHessian, inverse_hessian
from rarefy.solvers.outliers import gptq_with_outliers, round_around_outliers
from rarefy.solvers.sparsegpt import prune_with_feedback
from rarefy.statistics import Gram

BILEVEL = IntegerGrid(num_bits=3, group_size=16, zero="float", scales=BilevelScale(scale_bits=4, zero_bits=4))
EVEN = IntegerGrid(num_bits=4, group_size=32, zero="integer")
TERNARY = LevelGrid(levels=3, group_size=32)


def _named(weight: Tensor, inverse: InverseHessian) -> list[Term]:
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.01
    return round_around_outliers([weight], [mask.to(weight.device)], EVEN, inverse=inverse)[0]


SOLVERS: dict[str, Callable[[Tensor, InverseHessian], list[Term]]] = {
    "gptq": lambda w, h: gptq([w], h, EVEN, search=ClipSearch(), static_groups=True)[0],
    "gptq in turn": lambda w, h: gptq([w], h, EVEN)[0],
    "gptq, two-level": lambda w, h: gptq([w], h, BILEVEL, search=ClipSearch(norm=2), static_groups=True)[0],
    "ternary": lambda w, h: gptq([w], h, TERNARY)[0],
    "outliers": lambda w, h: gptq_with_outliers([w], h, BILEVEL, 0.2)[0][0],
    "outliers, searched": lambda w, h: gptq_with_outliers([w], h, BILEVEL, 0.2, ClipSearch())[0][0],
    "named outliers": _named,
    "half": lambda w, h: prune_with_feedback([w], h, obs, pattern=Bitmap())[0],
    "2:4 in codes": lambda w, h: prune_with_feedback([w], h, obs, pattern=NM(n=2, m=4), grid=EVEN)[0],
}


@contextmanager
def in_torch(device: str) -> Iterator[None]:
    """Without the kernels of columns on a kind of ``device``."""
    engine = columns.engines[device]
    columns.engines[device] = replace(engine, available=lambda: False)
    try:
        yield
    finally:
        columns.engines[device] = engine


def compared(kind: str, weight: Tensor, gram: Gram) -> tuple[float, float]:
    """By a kernel against torch: the output error, as a multiple, and the smallest share of equal weights of a term."""
    inverse = inverse_hessian(gram, 0.05, sort=kind not in ("half", "2:4 in codes"))
    found = SOLVERS[kind](weight, inverse)
    with in_torch(weight.device.type):
        expected = SOLVERS[kind](weight, inverse)
    moments, costs = gram.mean().double(), []
    for terms in (found, expected):
        lost = torch.stack([term.decode() for term in terms]).sum(0).double() - weight
        costs.append(float(((lost @ moments) * lost).sum()))
    pairs = zip(found, expected, strict=True)
    shares = [float((own.decode() == other.decode()).float().mean()) for own, other in pairs]
    return costs[0] / costs[1], min(shares)
