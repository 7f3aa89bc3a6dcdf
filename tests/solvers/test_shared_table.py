"""A table that channels share: against plain k-means, and what fitting ranges around stored errors gains."""

from __future__ import annotations

import pytest
import torch

from rarefy.formats.grids.lut import lloyd
from rarefy.solvers.shared_table import shared_table


def ranges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
    return (high + low) / 2, (high - low) / 2


def test_one_round_without_stored_errors_is_weighted_kmeans():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 3, generator=generator), torch.rand(400, 3, generator=generator)
    center, scale = ranges(x)
    found = shared_table(x, weight, center, scale, 3, rounds=1)
    expected = lloyd(((x - center) / scale).reshape(1, -1), (weight * scale.square()).reshape(1, -1), 8)[0]
    torch.testing.assert_close(found.lut, expected)
    error = found.nearest(x) * scale + center - x
    assert found.kept.all() and found.cost == pytest.approx(float((weight * error.square()).sum()), rel=1e-5)


def test_maps_are_found_that_numbers_were_made_with():
    generator = torch.Generator().manual_seed(1)
    table = torch.tensor([-1.0, -0.2, 0.1, 1.0])
    center, scale = torch.tensor([[3.0, -1.0, 0.0]]), torch.tensor([[0.5, 2.0, 1.0]])
    x = table[torch.randint(4, (500, 3), generator=generator)] * scale + center
    noisy = center + 0.05, scale * 1.1
    rough, fine = (shared_table(x, None, *noisy, 2, rounds=8, refine=refine) for refine in (False, True))
    assert fine.cost < 1e-6 < rough.cost


def test_tokens_with_many_large_numbers_are_part_of_the_fit():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(512, 16, generator=generator)
    x[::32] *= 6  # a few tokens of which all numbers are beyond every quantile
    order = x.sort(0).values
    low, high = order[20:21], order[-21:-20]
    center, scale = (high + low) / 2, (high - low) / 2
    inside, around = (shared_table(x, None, center, scale, 4, stored=2, rounds=rounds) for rounds in (1, 4))
    fitted = shared_table(x, None, center, scale, 4, stored=2, refine=True)
    assert fitted.cost <= around.cost < 0.5 * inside.cost
    assert (fitted.kept.sum(1) == 14).all()


def test_channels_without_spread_and_rows_without_weight_do_no_harm():
    x = torch.zeros(64, 2)
    x[:, 1] = torch.linspace(-1, 1, 64)
    center, scale = ranges(x)
    found = shared_table(x, torch.zeros(64, 2), center, scale, 2, refine=True)
    assert found.cost == 0
    assert found.lut.isfinite().all() and found.center.isfinite().all() and found.scale.isfinite().all()
