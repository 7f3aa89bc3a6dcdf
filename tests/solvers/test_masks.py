"""Masks of an exact number, whatever ties there are."""

from __future__ import annotations

import pytest
import torch

from rarefy.solvers.masks import largest_of_each, largest_share


@pytest.mark.parametrize("share", [0.0, 0.004, 0.1, 0.5, 1.0])
def test_largest_share_takes_the_largest(share: float, generator: torch.Generator) -> None:
    scores = torch.rand(3, 20, 31, generator=generator)
    for own, mask in zip(scores, largest_share(scores, share, scores), strict=True):
        assert int(mask.sum()) == round(share * 620)
        if mask.any() and not mask.all():
            assert float(own[mask].min()) > float(own[~mask].max())


def test_ties_go_by_the_second_order() -> None:
    scores = torch.tensor([[0.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.0, 0.0]])
    ties = torch.tensor([[9.0, 1.0, 4.0, 2.0], [0.0, 3.0, 9.0, 9.0]])
    assert largest_share(scores, 3 / 8, ties).tolist() == [[False, False, True, False], [True, True, False, False]]
    everything = largest_share(torch.zeros(4, 4), 0.25, torch.arange(16.0).view(4, 4))
    assert everything.nonzero().tolist() == [[3, 0], [3, 1], [3, 2], [3, 3]]


def test_kinds_do_not_take_the_same(generator: torch.Generator) -> None:
    first, second = torch.rand(2, 10, 40, generator=generator)
    mask = largest_of_each([(first, 0.05), (second, 0.1)], ties=second)
    assert int(mask.sum()) == 60
    assert bool(mask[largest_share(first, 0.05, second)].all())
    assert int(largest_of_each([(first, 0.05), (first, 0.05)], ties=second).sum()) == 40
