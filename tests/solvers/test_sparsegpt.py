"""Pruning with error feedback against the textbook; masks at exactly the wanted number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import IntegerGrid
from rarefy.formats.patterns import NM, Bitmap, Pattern
from rarefy.saliency import magnitude, obs, wanda
from rarefy.solvers.clip import ClipSearch
from rarefy.solvers.hessian import inverse_hessian
from rarefy.solvers.masks import keep_n_of_m, keep_share
from rarefy.solvers.prune import prune
from rarefy.solvers.sparsegpt import prune_with_feedback
from rarefy.statistics import Gram
from tests.solvers.problems import eliminate, output_error, problem, stacked

PATTERNS: dict[str, Pattern] = {
    "half": Bitmap(), "2:4": NM(n=2, m=4, index="rank"), "4:8": NM(n=4, m=8), "1:3": NM(n=1, m=3),
}  # fmt: skip


def naive(weight: Tensor, gram: Gram, pattern: Pattern, dampening: float) -> Tensor:
    """n:m groups, or blocks of 128 columns, chosen when the first of them is treated."""
    size = pattern.m if isinstance(pattern, NM) else 128
    kept = torch.zeros_like(weight, dtype=torch.bool)

    def treat(position: int, work: Tensor, inverse: Tensor) -> Tensor:
        if position % size == 0:
            stop = min(position + size, work.shape[1])
            part = inverse[position:stop, position:stop]
            # U_jj^2 is the pivot that column j will have when its turn comes.
            pivots = torch.linalg.cholesky(part, upper=True).diagonal().square()
            scores = work[:, position:stop].square() / pivots
            if isinstance(pattern, NM):
                kept[:, position:stop] = keep_n_of_m(scores, pattern.n, pattern.m)
            else:
                count = scores.numel() - round(0.5 * scores.numel())
                best = scores.flatten().topk(count).indices
                mask = torch.zeros(scores.numel(), dtype=torch.bool)
                mask[best] = True
                kept[:, position:stop] = mask.view_as(scores)
        return torch.where(kept[:, position], work[:, position], 0.0)

    return eliminate(weight, gram, dampening, treat)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("columns", [24, 150])
def test_equals_elimination(name: str, columns: int) -> None:
    weight, _, gram = problem(16, columns)
    [[term]] = prune_with_feedback([weight], inverse_hessian(gram, 0.05), obs, pattern=PATTERNS[name])
    expected = naive(weight, gram, PATTERNS[name], 0.05)
    torch.testing.assert_close(term.decode().double(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("bits", [None, 4])
def test_loses_less_than_pruning_alone(name: str, bits: int | None) -> None:
    weight, _, gram = problem(16, 96)
    grid = None if bits is None else IntegerGrid(num_bits=bits, group_size=32, zero="integer")
    pattern = PATTERNS[name]
    inverse = inverse_hessian(gram, 0.01)
    [[term]] = prune_with_feedback([weight], inverse, obs, pattern=pattern, sparsity=0.5, grid=grid)
    norm = gram.mean().diagonal().sqrt()
    alone = prune(weight, wanda(weight, norm), pattern, 0.5, grid).decode()
    by_size = prune(weight, magnitude(weight), pattern, 0.5, grid).decode()
    lost = output_error(weight, term.decode(), gram)
    assert lost < 0.8 * output_error(weight, alone, gram) < output_error(weight, by_size, gram)
    zeros = float((term.decode() == 0).float().mean())
    assert zeros >= {"half": 0.5, "2:4": 0.5, "4:8": 0.5, "1:3": 2 / 3}[name] - 1e-6


@pytest.mark.parametrize("group", [16, 100, None])
def test_groups_of_any_size_go_with_any_pattern(group: int | None) -> None:
    weight, _, gram = problem(12, 150)
    grid = IntegerGrid(num_bits=4, group_size=group, zero="integer")
    inverse = inverse_hessian(gram, 0.01)
    for pattern in PATTERNS.values():
        [[term]] = prune_with_feedback([weight], inverse, obs, pattern=pattern, grid=grid, search=ClipSearch())
        term.check()
        alone = prune(weight, magnitude(weight), pattern, 0.5, grid)
        assert output_error(weight, term.decode(), gram) < output_error(weight, alone.decode(), gram)


def test_each_weight_has_the_wanted_sparsity() -> None:
    _, _, gram = problem(1, 64)
    weights = [problem(16, 64, seed=1)[0], 100 * problem(8, 64, seed=2)[0]]
    solved = prune_with_feedback(weights, inverse_hessian(gram, 0.01), obs, pattern=Bitmap(), sparsity=0.25)
    for weight, [term] in zip(weights, solved, strict=True):
        assert int((term.decode() == 0).sum()) == weight.numel() // 4


@pytest.mark.parametrize("bits", [None, 4])
def test_experts(bits: int | None) -> None:
    weight, gram = stacked(8, 40, 3)
    grid = None if bits is None else IntegerGrid(num_bits=bits, group_size=20, zero="integer")
    inverse = inverse_hessian(gram, 0.01)
    for pattern in PATTERNS.values():
        [[term]] = prune_with_feedback([weight], inverse, obs, pattern=pattern, grid=grid)
        for index in range(3):
            [[alone]] = prune_with_feedback([weight[index]], inverse.member(index), obs, pattern=pattern, grid=grid)
            torch.testing.assert_close(term.decode()[index], alone.decode(), rtol=0, atol=1e-6)


def test_ties_do_not_drop_too_much() -> None:
    scores = torch.zeros(3, 10)
    assert keep_share(scores, 0.3).sum(1).tolist() == [7, 7, 7]
    assert keep_n_of_m(scores, 2, 4).sum(1).tolist() == [5, 5, 5]  # a short last group of 2 keeps 1
    assert keep_n_of_m(torch.tensor([[3.0, 1, 2, 0]]), 2, 4).tolist() == [[True, False, True, False]]


def test_scores() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    norm = torch.tensor([2.0, 10.0])
    assert torch.equal(wanda(weight, norm), torch.tensor([[2.0, 20.0], [6.0, 5.0]]))
    assert torch.equal(wanda(weight[None], norm[None]), wanda(weight, norm)[None])
    assert torch.equal(obs(weight, norm), (weight / norm).square())
