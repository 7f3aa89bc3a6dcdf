"""Solvers of columns on a GPU: the kernels have the bits of the loop in torch on the same device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import Grid, IntegerGrid
from rarefy.kernels import columns, native
from rarefy.solvers import gptq, outliers, sparsegpt
from rarefy.solvers.clip import ClipSearch, fit
from rarefy.solvers.feedback import compensate
from rarefy.solvers.hessian import inverse_hessian
from rarefy.statistics import Gram
from tests.kernels.problems import stretch
from tests.solvers.kinds import SOLVERS, compared, in_torch
from tests.solvers.problems import problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

GPU = torch.device("cuda", 0)


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


@pytest.mark.parametrize("kind", SOLVERS)
def test_solvers_find_what_they_find_in_torch(kind: str) -> None:
    cost, share = compared(kind, *on_gpu(192, 320))
    # Whether a weight is an outlier may be a tie, after which all that follows of its row and tile differs.
    chaotic = kind.startswith("outliers")
    assert cost <= (1.02 if chaotic else 1.001)
    assert share >= (0.9 if chaotic else 0.999)


@pytest.mark.parametrize("kind", SOLVERS)
def test_no_column_waits_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first column to the last the host only asks: whatever made it wait raises."""
    weight, gram = on_gpu(64, 320)
    inverse = inverse_hessian(gram, 0.05, sort=kind not in ("half", "2:4 in codes"))
    SOLVERS[kind](weight, inverse)  # compiles what there is to compile
    calls = []

    def unwaiting(*given: Any) -> Tensor:
        calls.append(given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return compensate(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    modules: list[Any] = [gptq, outliers, sparsegpt]
    for module in modules:
        monkeypatch.setattr(module, "compensate", unwaiting)
    SOLVERS[kind](weight, inverse)
    assert calls


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("size", [16, 128, 320])
def test_ranges_are_those_of_the_search_in_torch(zero: Any, size: int) -> None:
    weight, gram = on_gpu(64, 320)
    grid: Grid = IntegerGrid(num_bits=3, group_size=size, zero=zero)
    importance = gram.mean().diagonal().expand_as(weight)
    found = fit(grid, weight, importance, ClipSearch())
    with in_torch("cuda"):
        expected = fit(grid, weight, importance, ClipSearch())
    for name, value in expected.items():
        assert float((found[name] == value).float().mean()) > 0.995
