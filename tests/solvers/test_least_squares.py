"""Least squares against a direct solution in float64, for every row by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.solvers.hessian import inverse_hessian
from rarefy.solvers.least_squares import fit_kept, fit_scales
from tests.solvers.problems import problem, stacked


def damped(columns: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    weight, _, gram = problem(rows, columns)
    hessian = gram.mean()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return weight, hessian


def cost(weight: Tensor, found: Tensor, hessian: Tensor) -> Tensor:
    """Squared output error of each row, float64."""
    difference = (weight - found).double()
    return ((difference @ hessian.double()) * difference).sum(1)


def test_kept_weights_make_up_for_the_others_as_well_as_they_can(generator: torch.Generator) -> None:
    weight, hessian = damped(40)
    mask = torch.rand(weight.shape, generator=generator) < 0.6
    mask[0], mask[1] = False, True
    found = fit_kept(weight, hessian, mask, weight, steps=60)
    assert bool((found[~mask] == 0).all())
    torch.testing.assert_close(found[1], weight[1], rtol=1e-4, atol=1e-5)
    for row in range(2, len(weight)):
        kept = mask[row].nonzero().squeeze(1)
        moments = hessian.double()
        best = torch.linalg.solve(moments[kept][:, kept], (moments @ weight[row].double())[kept])
        torch.testing.assert_close(found[row, kept].double(), best, rtol=1e-3, atol=1e-4)


def test_every_step_lowers_the_error(generator: torch.Generator) -> None:
    weight, hessian = damped(64)
    mask = torch.rand(weight.shape, generator=generator) < 0.5
    before = cost(weight, weight * mask, hessian)
    for steps in range(1, 12):
        after = cost(weight, fit_kept(weight, hessian, mask, weight, steps), hessian)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after


@pytest.mark.parametrize("columns", [48, 40, 7])
def test_scales_are_those_of_a_direct_solution(columns: int, generator: torch.Generator) -> None:
    weight, hessian = damped(columns)
    parts = torch.randint(-3, 4, weight.shape, generator=generator).float()
    parts[2, :16] = 0
    found = fit_scales(weight, hessian, parts, 16)
    root = torch.linalg.cholesky(hessian.double()).T  # the error's norm is |root (weight - stored)|
    for row in range(len(weight)):
        design = torch.stack([
            root[:, start : start + 16] @ parts[row, start : start + 16].double() for start in range(0, columns, 16)
        ], 1)  # fmt: skip
        best = torch.linalg.lstsq(design, (root @ weight[row].double())[:, None], driver="gelsd").solution.squeeze(1)
        torch.testing.assert_close(found[row].double(), best, rtol=1e-3, atol=1e-4)


def test_rows_whose_groups_cannot_be_told_apart_are_left_alone() -> None:
    weight, hessian = damped(32)
    hessian[16:] = hessian[:16]
    hessian[:, 16:] = hessian[:, :16]
    parts = weight.clone()
    parts[:, 16:] = parts[:, :16]
    found = fit_scales(weight, hessian, parts, 16)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("sort", [False, True])
def test_the_hessian_comes_back_from_its_inverse(sort: bool) -> None:
    _, gram = stacked(4, 24, 3)
    found = inverse_hessian(gram, 0.05, sort).hessian()
    for member, own in zip(gram.mean(), found, strict=True):
        expected = member.clone()
        expected.diagonal().add_(0.05 * member.diagonal().mean())
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
