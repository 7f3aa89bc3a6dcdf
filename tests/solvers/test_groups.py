"""Groups of inputs: what losing one costs, which go, and what the others make of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import IntegerGrid
from rarefy.formats.patterns import Groups
from rarefy.formats.scales import BilevelScale
from rarefy.saliency import group_mean, group_obs
from rarefy.solvers.groups import diagonal_blocks, prune_groups
from rarefy.solvers.hessian import inverse_hessian
from rarefy.statistics import Gram
from tests.solvers.problems import output_error, problem, stacked

INTEGERS = IntegerGrid(num_bits=4, group_size=16, zero="integer")
TWO_LEVELS = IntegerGrid(
    num_bits=4, group_size=16, zero="float", scales=BilevelScale(scale_bits=4, zero_bits=4, rows=8)
)
BITMAP = Groups(size=16, index="bitmap")


def pruned(weight: Tensor, gram: Gram, sparsity: float = 0.5, pattern: Groups = BITMAP, **options: object) -> Tensor:
    inverse = inverse_hessian(gram, 0.01, sort=True)
    [[term]] = prune_groups([weight], inverse, group_obs, pattern, sparsity, **options)  # type: ignore[arg-type]
    term.check()
    return term.decode()


def lost(weight: Tensor, gram: Gram, *args: object, **options: object) -> float:
    return output_error(weight, pruned(weight, gram, *args, **options), gram)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [32, 40])
@pytest.mark.parametrize("sort", [False, True])
def test_score_is_what_losing_a_group_costs_at_best(columns: int, sort: bool) -> None:
    weight, _, gram = problem(6, columns)
    inverse = inverse_hessian(gram, 0.01, sort)
    blocks, hessian = diagonal_blocks(inverse, 8), inverse.hessian()[0].double()
    scores = group_obs(weight.unflatten(1, (-1, 8)), blocks)
    for group in range(columns // 8):
        kept = [column for column in range(columns) if column // 8 != group]
        for row in range(len(weight)):
            dense = weight[row].double()
            best = torch.zeros_like(dense)
            best[kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ dense)[kept])
            cost = (dense - best) @ hessian @ (dense - best)
            torch.testing.assert_close(scores[row, group].double(), cost, rtol=1e-3, atol=1e-6)


def test_score_of_single_weights_is_that_of_one_at_a_time() -> None:
    weight, _, gram = problem(6, 16)
    blocks = diagonal_blocks(inverse_hessian(gram, 0.01), 1)
    torch.testing.assert_close(group_obs(weight[..., None], blocks), group_mean(weight[..., None], blocks))


@pytest.mark.parametrize("columns", [96, 104])
@pytest.mark.parametrize("grid", [None, INTEGERS, TWO_LEVELS], ids=["16 bits", "integers", "two levels"])
def test_whole_groups_go_at_the_wanted_number(columns: int, grid: IntegerGrid | None) -> None:
    weight, _, gram = problem(24, columns)
    groups = -(-columns // 16)
    for sparsity in (0.25, 0.5):
        stored = pruned(weight, gram, sparsity, rows=[torch.ones(24)], grid=grid)
        kept = torch.nn.functional.pad(stored, (0, -columns % 16)).unflatten(1, (-1, 16)).ne(0).any(-1)
        assert int((~kept).sum()) == round(sparsity * kept.numel())
        for index in ("bitmap", "ids", "csr"):
            stored = pruned(weight, gram, sparsity, Groups(size=16, index=index), grid=grid)  # type: ignore[arg-type]
            kept = torch.nn.functional.pad(stored, (0, -columns % 16)).unflatten(1, (-1, 16)).ne(0).any(-1)
            assert kept.sum(1).tolist() == [groups - round(sparsity * groups)] * len(weight)


def test_the_others_make_up_for_what_goes() -> None:
    weight, _, gram = problem(32, 128)
    stored = pruned(weight, gram, rounds=1)
    assert output_error(weight, stored, gram) < 0.9 * output_error(weight, weight * (stored != 0), gram)
    assert lost(weight, gram, rounds=8) < lost(weight, gram, rounds=1)
    size = torch.logspace(-1, 1, len(weight))
    uneven = weight * size[:, None]
    assert lost(uneven, gram, rows=[torch.ones_like(size)]) < 0.7 * lost(uneven, gram)
    kept = pruned(uneven, gram, rows=[size**-4]).ne(0).sum(1)
    assert int(kept[:8].sum()) > 2 * int(kept[-8:].sum())


def test_more_sparsity_costs_more() -> None:
    weight, _, gram = problem(32, 160)
    costs = [lost(weight, gram, sparsity, grid=INTEGERS) for sparsity in (0.2, 0.3, 0.4, 0.5)]
    assert costs == sorted(costs)


@pytest.mark.parametrize("grid", [INTEGERS, TWO_LEVELS], ids=["integers", "two levels"])
def test_rounding_and_fitted_scales(grid: IntegerGrid) -> None:
    weight, _, gram = problem(32, 128)
    exact, plain, refitted = (lost(weight, gram, grid=own, refit=refit) for own, refit in
                              ((None, False), (grid, False), (grid, True)))  # fmt: skip
    assert exact < refitted <= plain < 1.3 * exact


def test_a_scale_beyond_16_bits_is_shared_out() -> None:
    weight, _, gram = problem(16, 64)
    for factor in (1e8, 1e-7):
        stored = pruned(weight * factor, gram, grid=INTEGERS)
        torch.testing.assert_close(stored / factor, pruned(weight, gram, grid=INTEGERS), rtol=0.05, atol=0.02)


def test_experts_are_pruned_as_each_alone() -> None:
    weight, gram = stacked(16, 64, 3)
    inverse = inverse_hessian(gram, 0.01, sort=True)
    counts = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    for grid, rows in ((None, None), (INTEGERS, None), (INTEGERS, counts)):
        [[term]] = prune_groups(
            [weight], inverse, group_obs, BITMAP, 0.5, grid=grid, rows=None if rows is None else [rows]
        )
        for index, own in enumerate(weight):
            of_one = None if rows is None else [rows[index]]
            [[alone]] = prune_groups([own], inverse.member(index), group_obs, BITMAP, 0.5, grid=grid, rows=of_one)
            torch.testing.assert_close(term.select(index).decode(), alone.decode())
