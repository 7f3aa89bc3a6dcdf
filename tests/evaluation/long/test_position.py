from __future__ import annotations

import numpy as np
import pytest

from rarefy.evaluation.long.position import fit_power_law, position_bins, position_curve


def test_bins_double_and_leave_the_first_tokens_out() -> None:
    assert position_bins(128) == ((16, 32), (32, 64), (64, 128))
    assert position_bins(200) == ((16, 32), (32, 64), (64, 128), (128, 200))
    assert position_bins(150) == ((16, 32), (32, 64), (64, 128))


@pytest.mark.parametrize("documents", [3, 40])
def test_a_power_law_is_found_again(documents: int) -> None:
    x = np.array([(a * b) ** 0.5 for a, b in position_bins(4096)])
    dice = np.random.default_rng(0)
    rows = 3.0 * x**-0.4 + 1.5 + 0.001 * dice.normal(size=(documents, len(x)))
    law = fit_power_law(list(x), rows)
    assert law is not None and law.beta == pytest.approx(-0.4, abs=0.05)
    assert law.alpha == pytest.approx(3, rel=0.1) and law.gamma == pytest.approx(1.5, rel=0.1) and law.error < 0.01
    assert fit_power_law([1, 2, 3], rows[:, :3]) is None


def test_a_curve_averages_the_right_tokens_and_pairs_documents() -> None:
    position = np.arange(1, 128)
    nll = np.stack([1 / position, 3 / position])
    curve = position_curve(nll, kl=np.ones_like(nll))
    assert curve.bins[0] == (16, 32) and curve.by_document[0][0] == pytest.approx((1 / np.arange(16, 32)).mean())
    assert curve.nll[0] == pytest.approx(2 * curve.by_document[0][0]) and curve.kl == pytest.approx((1, 1, 1))
    worse = position_curve(nll + np.array([[0.1], [0.2]]), None)
    change = worse.change(curve)[0]
    assert change is not None and change.value == pytest.approx(0.15) and change.low > 0 and worse.kl is None
