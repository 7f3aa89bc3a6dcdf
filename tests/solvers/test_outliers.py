"""Outliers: the leave-one-out test against its naive form, and what keeping them buys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import Grid, IntegerGrid, LutGrid
from rarefy.formats.scales import BilevelScale
from rarefy.solvers.gptq import gptq
from rarefy.solvers.hessian import inverse_hessian
from rarefy.solvers.outliers import LIMIT, gptq_with_outliers, leave_one_out_gain, round_around_outliers
from tests.solvers.problems import output_error, problem, stacked

GRID = IntegerGrid(num_bits=3, group_size=16, zero="float", scales=BilevelScale())


def cost(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
    low, high = weight.min(), weight.max()
    step = (high - low) / (levels - 1)
    rounded = ((weight - low) / step).round().clamp(0, levels - 1) * step + low
    return ((weight - rounded) / scale).square()


@pytest.mark.parametrize("size", [3, 8, 16])
@pytest.mark.parametrize("levels", [4, 8, 16])
def test_gain_is_that_of_leaving_each_one_out(size: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(40, size, generator=generator)
    weight[::3, 1] *= 7
    scale = torch.rand(size, generator=generator) + 0.2
    found = leave_one_out_gain(weight, scale, levels)
    for row in range(len(weight)):
        base = cost(weight[row], scale, levels).sum()
        for left_out in range(size):
            others = [index for index in range(size) if index != left_out]
            expected = base - cost(weight[row, others], scale[others], levels).sum()
            torch.testing.assert_close(found[row, left_out], expected, rtol=1e-3, atol=1e-4)


def test_gain_of_equal_weights_and_of_a_single_one_is_finite() -> None:
    for weight in (torch.full((2, 5), 3.0), torch.zeros(2, 5), torch.ones(2, 1)):
        assert torch.equal(leave_one_out_gain(weight, torch.ones(weight.shape[-1]), 8), torch.zeros_like(weight))


def test_infinite_threshold_is_rounding_with_feedback() -> None:
    weight, _, gram = problem(32, 70)
    inverse = inverse_hessian(gram, 0.1, sort=True)
    solved, notes = gptq_with_outliers([weight], inverse, GRID, float("inf"))
    [[plain]] = gptq([weight], inverse, GRID)
    assert notes == [] and len(solved[0]) == 1
    assert torch.equal(solved[0][0].decode(), plain.decode())


@pytest.mark.parametrize("sort", [False, True])
def test_outliers_lower_the_error_and_more_of_them_lower_it_further(sort: bool) -> None:
    weight, _, gram = problem(32, 96)
    weight[3, 40], weight[9, 2] = 2.0, -1.5
    inverse = inverse_hessian(gram, 0.1, sort)
    errors, counts = [], []
    for threshold in (float("inf"), 1.0, 0.2):
        [terms], _ = gptq_with_outliers([weight], inverse, GRID, threshold)
        stored = sum((term.decode() for term in terms), torch.zeros_like(weight))
        errors.append(output_error(weight, stored, gram))
        counts.append(terms[1].get_buffer("entries").numel() if len(terms) > 1 else 0)
    assert counts[0] == 0 < counts[1] < counts[2] <= LIMIT * weight.numel()
    assert errors[0] > errors[1] > errors[2]


def test_weights_of_one_input_and_experts_are_solved_as_each_alone() -> None:
    _, _, gram = problem(1, 64)
    weights = [problem(rows, 64, seed=rows)[0] * rows for rows in (16, 32)]
    inverse = inverse_hessian(gram, 0.1, sort=True)
    together, _ = gptq_with_outliers(weights, inverse, GRID, 0.3)
    for weight, terms in zip(weights, together, strict=True):
        [alone], _ = gptq_with_outliers([weight], inverse, GRID, 0.3)
        for term, own in zip(terms, alone, strict=True):
            torch.testing.assert_close(term.decode(), own.decode(), rtol=1e-4, atol=1e-5)
    for rows in (16, 10):
        weight, moments = stacked(rows, 48, 3)
        inverse = inverse_hessian(moments, 0.1, sort=True)
        [terms], _ = gptq_with_outliers([weight], inverse, GRID, 0.3)
        stored = torch.stack([term.decode() for term in terms]).sum(0)
        for index in range(3):
            [alone], _ = gptq_with_outliers([weight[index]], inverse.member(index), GRID, 0.3)
            expected = torch.stack([term.decode() for term in alone]).sum(0)
            torch.testing.assert_close(stored[index], expected, rtol=1e-4, atol=1e-5)


def test_a_threshold_that_keeps_everything_is_raised_and_noted() -> None:
    weight, _, gram = problem(16, 48)
    [terms], notes = gptq_with_outliers([weight], inverse_hessian(gram, 0.1), GRID, 1e-6)
    assert 0 < terms[1].get_buffer("entries").numel() <= LIMIT * weight.numel()
    assert len(notes) == 1 and notes[0].startswith("more than 5% of it would be outliers; threshold")


def test_outliers_beyond_16_bits_are_stored_coarser() -> None:
    weight, _, gram = problem(16, 48)
    weight *= 1e7
    [terms], _ = gptq_with_outliers([weight], inverse_hessian(gram, 0.1), GRID, 0.2)
    stored = torch.stack([term.decode() for term in terms]).sum(0)
    assert terms[1].spec.dtype == "bfloat16"  # type: ignore[attr-defined]
    assert float((stored - weight).norm() / weight.norm()) < 0.2


EVEN = IntegerGrid(num_bits=3, group_size=16, zero="integer")
GRIDS = [EVEN, GRID, LutGrid(num_bits=3), LutGrid(num_bits=3, rows_per_lut=5)]


def named(weight: Tensor, share: float = 0.02) -> Tensor:
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < share


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=["integers", "two levels", "tables", "shared tables"])
def test_named_outliers_are_exact_and_spoil_nothing(grid: Grid, feedback: bool) -> None:
    weight, _, gram = problem(32, 70)
    mask = named(weight)
    wild = torch.where(mask, 40 * weight.sign(), weight)
    inverse = inverse_hessian(gram, 0.1, sort=True) if feedback else None
    [[dense, residual]] = round_around_outliers([wild], [mask], grid, inverse=inverse)
    stored = dense.decode() + residual.decode()
    assert int(residual.decode().ne(0).sum()) == int(mask.sum())
    if not feedback:
        torch.testing.assert_close(stored[mask], wild[mask], rtol=2e-3, atol=0)
    assert float((stored - wild)[~mask].abs().max()) < 0.6
    [terms] = round_around_outliers([weight], [torch.zeros_like(mask)], grid, inverse=inverse)
    assert len(terms) == 1
    [[plain, kept]] = round_around_outliers([weight], [mask], grid, inverse=inverse)
    assert output_error(weight, plain.decode() + kept.decode(), gram) < output_error(weight, terms[0].decode(), gram)


def test_without_outliers_it_is_gptq() -> None:
    weight, _, gram = problem(32, 70)
    inverse = inverse_hessian(gram, 0.1, sort=True)
    for grid in GRIDS:
        [[term]] = round_around_outliers([weight], [named(weight, 0)], grid, inverse=inverse)
        [[plain]] = gptq([weight], inverse, grid, static_groups=True)
        assert torch.equal(term.decode(), plain.decode()) or isinstance(grid, LutGrid)


def test_importance_moves_the_values_of_a_table() -> None:
    weight = problem(32, 70)[0]
    importance = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) ** 4
    costs = []
    for given in ([importance], None):
        [terms] = round_around_outliers([weight], [named(weight)], LutGrid(num_bits=3), importance=given)
        lacking = weight - torch.stack([term.decode() for term in terms]).sum(0)
        costs.append(float((importance * lacking.square()).sum()))
    assert costs[0] < 0.9 * costs[1]


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("grid", GRIDS[:3], ids=["integers", "two levels", "tables"])
def test_named_outliers_of_many_weights_are_those_of_each(grid: Grid, feedback: bool) -> None:
    _, _, gram = problem(1, 64)
    inverse = inverse_hessian(gram, 0.1, sort=True) if feedback else None
    weights = [problem(rows, 64, seed=rows)[0] for rows in (16, 32)]
    masks = [named(weight, 0.05) for weight in weights]
    together = round_around_outliers(weights, masks, grid, inverse=inverse)
    for weight, mask, terms in zip(weights, masks, together, strict=True):
        [alone] = round_around_outliers([weight], [mask], grid, inverse=inverse)
        for term, own in zip(terms, alone, strict=True):
            torch.testing.assert_close(term.decode(), own.decode(), rtol=1e-4, atol=1e-5)
    experts, moments = stacked(16, 48, 3)
    inverse = inverse_hessian(moments, 0.1, sort=True) if feedback else None
    mask = named(experts, 0.05)
    [terms] = round_around_outliers([experts], [mask], grid, inverse=inverse)
    for index in range(3):
        of_one = inverse.member(index) if inverse is not None else None
        [alone] = round_around_outliers([experts[index]], [mask[index]], grid, inverse=of_one)
        for term, own in zip(terms, alone, strict=True):
            torch.testing.assert_close(term.select(index).decode(), own.decode(), rtol=1e-4, atol=1e-5)
