"""Solvers of columns on a GPU: the kernels have the bits of the loop in torch on the same device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import Grid, IntegerGrid, LevelGrid
from rarefy.formats.patterns import NM, Bitmap
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms import Term
from rarefy.kernels import columns, native
from rarefy.saliency import obs
from rarefy.solvers.clip import ClipSearch, fit
from rarefy.solvers.gptq import gptq
from rarefy.solvers.hessian import InverseHessian, inverse_hessian
from rarefy.solvers.outliers import gptq_with_outliers, round_around_outliers
from rarefy.solvers.sparsegpt import prune_with_feedback
from rarefy.statistics import Gram
from tests.kernels.problems import stretch
from tests.solvers.problems import problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

GPU = torch.device("cuda", 0)
BILEVEL = IntegerGrid(num_bits=3, group_size=16, zero="float", scales=BilevelScale())
EVEN = IntegerGrid(num_bits=4, group_size=32, zero="integer")


@contextmanager
def in_torch() -> Iterator[None]:
    engine = columns.engines["cuda"]
    columns.engines["cuda"] = replace(engine, available=lambda: False)
    try:
        yield
    finally:
        columns.engines["cuda"] = engine


def on_gpu(rows: int, width: int) -> tuple[Tensor, Gram]:
    weight, _, gram = problem(rows, width)
    moved = Gram(width, device=GPU)
    moved.sum.copy_(gram.sum)
    moved.tokens.copy_(gram.tokens)
    return weight.to(GPU), moved


@pytest.mark.parametrize("count,width", [(1, 1), (16, 128), (37, 128), (128, 128), (150, 300)])
@pytest.mark.parametrize("rule", columns.RULES)
def test_columns_are_those_of_the_loop(rule: columns.Rule, count: int, width: int) -> None:
    for rounds in (True, False) if rule == "drop" else (True,):
        found, expected = (
            {name: own.to(GPU) if isinstance(own, Tensor) else own for name, own in given.items()}
            for given in (stretch(rule, 2, 77, count, width, rounds=rounds) for _ in range(2))
        )
        native.round_columns(**found)
        columns.reference(**expected)
        for name in ("codes", "marked", "lost", "errors", "block"):
            assert expected[name] is None or torch.equal(found[name], expected[name]), name


def solve(kind: str, weight: Tensor, inverse: InverseHessian) -> list[Term]:
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)).to(GPU) < 0.01
    solvers: dict[str, Any] = {
        "gptq": lambda: gptq([weight], inverse, EVEN, search=ClipSearch(), static_groups=True)[0],
        "gptq in turn": lambda: gptq([weight], inverse, EVEN)[0],
        "ternary": lambda: gptq([weight], inverse, LevelGrid(levels=3, group_size=32))[0],
        "outliers": lambda: gptq_with_outliers([weight], inverse, BILEVEL, 0.2)[0][0],
        "outliers, searched": lambda: gptq_with_outliers([weight], inverse, BILEVEL, 0.2, ClipSearch())[0][0],
        "named outliers": lambda: round_around_outliers([weight], [mask], EVEN, inverse=inverse)[0],
        "half": lambda: prune_with_feedback([weight], inverse, obs, pattern=Bitmap())[0],
        "2:4 in codes": lambda: prune_with_feedback([weight], inverse, obs, pattern=NM(n=2, m=4), grid=EVEN)[0],
    }
    found: list[Term] = solvers[kind]()
    return found


@pytest.mark.parametrize(
    "kind",
    ["gptq", "gptq in turn", "ternary", "outliers", "outliers, searched", "named outliers", "half", "2:4 in codes"],
)
def test_solvers_find_what_they_find_in_torch(kind: str) -> None:
    weight, gram = on_gpu(192, 320)
    inverse = inverse_hessian(gram, 0.05, sort=kind not in ("half", "2:4 in codes"))
    found = solve(kind, weight, inverse)
    with in_torch():
        expected = solve(kind, weight, inverse)
    moments, costs = gram.mean().double(), []
    for terms in (found, expected):
        lost = torch.stack([term.decode() for term in terms]).sum(0).double() - weight
        costs.append(float(((lost @ moments) * lost).sum()))
    assert costs[0] <= costs[1] * 1.001
    for own, other in zip(found, expected, strict=True):
        same = own.decode() == other.decode()
        # A range or an outlier may be a tie, after which all that follows of a row differs.
        assert float(same.float().mean()) > (0.98 if kind.startswith("outliers") else 0.999)


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("size", [16, 128, 320])
def test_ranges_are_those_of_the_search_in_torch(zero: Any, size: int) -> None:
    weight, gram = on_gpu(64, 320)
    grid: Grid = IntegerGrid(num_bits=3, group_size=size, zero=zero)
    importance = gram.mean().diagonal().expand_as(weight)
    found = fit(grid, weight, importance, ClipSearch())
    with in_torch():
        expected = fit(grid, weight, importance, ClipSearch())
    for name, value in expected.items():
        assert float((found[name] == value).float().mean()) > 0.995
