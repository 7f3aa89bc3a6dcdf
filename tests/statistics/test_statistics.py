"""Statistics are sums: of parts they add up to those of the whole, in every dtype and for every expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import FormatError
from rarefy.statistics import ColumnMoments, Fisher, Gradient, Gram, InputStatistic, Statistics, inputs

INPUTS: list[type[InputStatistic]] = [Gram, ColumnMoments]


def draw(tokens: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, columns + 1)


def assert_equal(found: InputStatistic, x: Tensor, tolerance: float = 1e-5) -> None:
    wide = x.double()
    assert int(found.tokens) == len(x)
    if isinstance(found, Gram):
        assert found.sum.dtype == torch.float32
        torch.testing.assert_close(found.sum.double(), wide.T @ wide, rtol=tolerance, atol=tolerance * len(x))
        torch.testing.assert_close(found.mean() * len(x), found.sum)
    if isinstance(found, ColumnMoments):
        torch.testing.assert_close(found.absolute, wide.abs().sum(0), rtol=tolerance, atol=1e-9)
        torch.testing.assert_close(found.square, wide.square().sum(0), rtol=tolerance, atol=1e-9)
        torch.testing.assert_close(found.norm().double(), wide.square().mean(0).sqrt(), rtol=tolerance, atol=1e-9)
        torch.testing.assert_close(found.mean_absolute().double(), wide.abs().mean(0), rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_every_dtype(kind: type[InputStatistic], dtype: torch.dtype) -> None:
    """16-bit values are summed in 32 bits: what is lost is lost before."""
    x = draw(50, 7).to(dtype)
    found = kind(7)
    found.update(x)
    assert_equal(found, x)


@pytest.mark.parametrize("kind", INPUTS)
def test_merged_parts_are_the_whole(kind: type[InputStatistic]) -> None:
    x = draw(60, 5)
    parts = [kind(5) for _ in range(3)]
    for part, piece in zip(parts, x.split([1, 40, 19]), strict=True):
        part.update(piece)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert_equal(parts[0], x)
    assert_equal(parts[1], x[1:41])


@pytest.mark.parametrize("kind", INPUTS)
def test_chunks_do_not_matter(kind: type[InputStatistic], monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(50, 5)
    whole, pieces = kind(5), kind(5)
    whole.update(x)
    monkeypatch.setattr(inputs, "CHUNK_TOKENS", 7)
    pieces.update(x)
    pieces.update(x[:0])
    assert_equal(pieces, x)
    assert int(whole.tokens) == int(pieces.tokens) == 50


def test_many_tokens_do_not_stall_a_sum() -> None:
    """A sum of ones in 16 bits would stop at 256 or 2048."""
    x = torch.ones(20_000, 3, dtype=torch.bfloat16)
    for kind in INPUTS:
        found = kind(3)
        found.update(x)
        assert_equal(found, x)


@pytest.mark.parametrize("kind", INPUTS)
def test_experts_are_apart(kind: type[InputStatistic]) -> None:
    first, second = draw(9, 4, 1), draw(6, 4, 2)
    found = kind(4, members=3)
    found.update(first[:5], 0)
    found.update(second, 2)
    found.update(first[5:], 0)
    assert found.tokens.tolist() == [9, 0, 6] and found.unseen().tolist() == [False, True, False]
    for member, x in ((0, first), (2, second)):
        alone = kind(4)
        alone.update(x)
        for name, tensor in alone.sums().items():
            torch.testing.assert_close(found.sums()[name][member], tensor, msg=name)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("members", [None, 2])
def test_what_nothing_is_known_of_counts_alike(kind: type[InputStatistic], members: int | None) -> None:
    found = kind(4, members)
    if members:
        found.update(draw(9, 4), 1)
    before = {name: tensor.clone() for name, tensor in found.sums().items()}
    found.assume_uniform_()
    blank = found if members is None else None
    if isinstance(found, Gram):
        mean = found.mean()
        assert torch.equal(mean if blank else mean[0], torch.eye(4))
    if isinstance(found, ColumnMoments):
        for mean in (found.norm(), found.mean_absolute()):
            assert torch.equal(mean if blank else mean[0], torch.ones(4))
    assert torch.equal(found.tokens, before["tokens"])
    if members:
        assert all(torch.equal(tensor[1], before[name][1]) for name, tensor in found.sums().items())


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_found(kind: type[InputStatistic], value: float) -> None:
    x = draw(8, 3)
    found = kind(3)
    found.update(x)
    found.check()
    x[4, 1] = value
    found.update(x)
    with pytest.raises(FormatError, match="its inputs are NaN or infinite"):
        found.check()


def test_gradients_are_summed_by_sequence() -> None:
    gradients = [draw(4, 3, seed).to(dtype) for seed, dtype in ((0, torch.float32), (1, torch.bfloat16))]
    fisher, gradient = Fisher((4, 3)), Gradient((4, 3))
    for one in (*gradients, torch.full((4, 3), float("nan"))):
        fisher.update(one)
        gradient.update(one)
    wide = torch.stack([one.double() for one in gradients])
    torch.testing.assert_close(fisher.mean().double(), wide.square().mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient.mean().double(), wide.mean(0), rtol=1e-6, atol=1e-9)
    assert (int(fisher.sequences), int(fisher.skipped)) == (2, 1)
    # The square of a whole batch's gradient is something else.
    assert not torch.allclose(fisher.sum, gradient.sum.square())
    other = Fisher((4, 3))
    other.update(gradients[0])
    fisher.merge(other)
    torch.testing.assert_close(fisher.sum.double(), wide.square().sum(0) + wide[0].square(), rtol=1e-6, atol=1e-9)
    assert int(fisher.sequences) == 3


def test_experts_without_gradients() -> None:
    fisher = Fisher((3, 2, 2))
    one = torch.ones(3, 2, 2)
    one[1] = 0
    fisher.update(one)
    fisher.update(2 * one)
    assert fisher.unseen().tolist() == [False, True, False]
    fisher.assume_uniform_()
    assert torch.equal(fisher.mean()[1], torch.ones(2, 2)) and torch.equal(fisher.mean()[0], torch.full((2, 2), 2.5))
    assert fisher.unseen().tolist() == [False, True, False]
    gram = Gram(2, members=3)
    for expert in (1, 2):
        gram.update(torch.ones(1, 2), expert)
    both = Statistics(gram=gram, fisher=fisher)
    unseen, tokens = both.unseen(), both.tokens
    assert unseen is not None and unseen.tolist() == [True, True, False]
    assert tokens is not None and tokens.tolist() == [0, 1, 1]
    assert Statistics().unseen() is None and Statistics().tokens is None


@pytest.mark.parametrize("columns", [767, 900, 1537])
def test_halves_of_a_wide_gram_are_the_same(columns: int) -> None:
    x, found = torch.randn(30, columns, generator=torch.Generator().manual_seed(0)), Gram(columns)
    found.update(x)
    torch.testing.assert_close(found.sum, (x.double().T @ x.double()).float(), rtol=1e-4, atol=1e-4)
