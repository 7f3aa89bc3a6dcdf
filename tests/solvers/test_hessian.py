"""The inverse Hessian: its factor, its order, and every rung of the ladder."""

from __future__ import annotations

import pytest
import torch

from rarefy.solvers.hessian import inverse_hessian
from rarefy.statistics import Gram
from tests.solvers.problems import problem, stacked


@pytest.mark.parametrize("columns", [1, 2, 17, 64])
@pytest.mark.parametrize("sort", [False, True])
def test_factor_is_that_of_the_inverse(columns: int, sort: bool) -> None:
    _, _, gram = problem(2, columns)
    found = inverse_hessian(gram, 0.01, sort)
    order = found.order[0]
    hessian = gram.mean().double()[order][:, order]
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = found.upper[0].double()
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    expected = hessian.inverse()
    torch.testing.assert_close(upper.T @ upper, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    assert found.notes == []
    if sort:
        assert bool((found.diagonal[0].diff() <= 0).all())
        assert torch.equal(found.in_place(found.diagonal)[0], gram.mean().diagonal())


def test_columns_without_input_touch_no_other() -> None:
    _, x, _ = problem(2, 12)
    x[:, [3, 7]] = 0
    gram = Gram(12)
    gram.update(x)
    upper = inverse_hessian(gram, 0.01).upper[0]
    for column in (3, 7):
        others = [index for index in range(12) if index != column]
        assert bool((upper[column, others] == 0).all()) and bool((upper[others, column] == 0).all())
        assert float(upper[column, column]) > 0


def test_a_layer_without_tokens_is_rounded() -> None:
    found = inverse_hessian(Gram(6), 0.01)
    assert torch.equal(found.upper[0], torch.eye(6))
    assert found.notes == ["no calibration input reached it; rounded to nearest"]


def test_few_tokens_are_noted_and_damped() -> None:
    _, x, _ = problem(2, 32)
    gram = Gram(32)
    gram.update(x[:5])
    found = inverse_hessian(gram, 1e-6)
    assert found.notes == ["only 5 calibration tokens for 32 columns"]
    assert bool(torch.isfinite(found.upper).all())


def test_an_indefinite_hessian_climbs_the_ladder() -> None:
    _, _, gram = problem(2, 8)
    # What sums in too few bits can come to: a correlation above one.
    gram.sum[2, 3] = gram.sum[3, 2] = 1.02 * (gram.sum[2, 2] * gram.sum[3, 3]).sqrt()
    found = inverse_hessian(gram, 1e-4)
    assert len(found.notes) == 1 and "not positive definite; dampening" in found.notes[0]


def test_a_hopeless_hessian_is_taken_column_by_column() -> None:
    _, _, gram = problem(2, 4)
    gram.sum[0, 1] = gram.sum[1, 0] = 100 * gram.sum.diagonal().max()
    found = inverse_hessian(gram, 0.01)
    assert found.notes == ["its Hessian could not be factored; columns were rounded one by one"]
    assert torch.equal(found.upper[0], found.upper[0].diagonal().diag())


def test_experts_have_their_own() -> None:
    _, gram = stacked(2, 10, 3)
    gram.sum[1], gram.tokens[1] = 0, 0
    found = inverse_hessian(gram, 0.01, sort=True)
    assert found.notes == ["no calibration input reached it; rounded to nearest (expert 1)"]
    own = inverse_hessian(problem(2, 10, seed=2)[2], 0.01, sort=True)
    torch.testing.assert_close(found.member(2).upper, own.upper)
    assert torch.equal(found.member(2).order, own.order)
