from __future__ import annotations

import math

import numpy as np
import pytest

from rarefy.core.errors import OptionError
from rarefy.evaluation.bootstrap import mean_interval, paired_interval


@pytest.mark.parametrize("count", [40, 150])
def test_intervals_cover_the_truth_as_often_as_they_say(count: int) -> None:
    """Two models that answer 70% and 60% of all questions, mostly the same ones: the true difference is -0.1."""
    dice = np.random.default_rng(1)
    covered = trials = 0
    for trial in range(400):
        reference = dice.random(count) < 0.7
        ours = np.where(dice.random(count) < 0.8, reference, dice.random(count) < 0.2)
        interval = paired_interval(ours.tolist(), reference.tolist(), resamples=400, seed=trial)
        assert interval is not None
        covered += interval.low <= -0.1 <= interval.high
        trials += 1
    assert 0.90 <= covered / trials <= 0.985


def test_pairing_removes_what_both_share() -> None:
    dice = np.random.default_rng(0)
    hardness = dice.normal(size=200)
    paired = paired_interval((hardness - 0.05).tolist(), hardness.tolist())
    alone = mean_interval((hardness - 0.05).tolist())
    assert paired is not None and alone is not None
    assert paired.value == pytest.approx(-0.05) and paired.high < 0
    assert alone.low < 0 < alone.high and alone.high - alone.low > 10 * (paired.high - paired.low)


def test_a_statistic_of_its_own_agrees_with_the_mean() -> None:
    ours, reference = [1.0, 0.0, 1.0, 1.0, 0.0] * 8, [1.0, 1.0, 1.0, 0.0, 1.0] * 8
    fast = paired_interval(ours, reference, resamples=2000)
    slow = paired_interval(ours, reference, lambda items: sum(items) / len(items), resamples=2000)
    assert fast is not None and slow is not None and fast.value == pytest.approx(slow.value)
    assert fast.low == pytest.approx(slow.low, abs=0.03) and fast.high == pytest.approx(slow.high, abs=0.03)


def test_items_of_different_weight() -> None:
    """A perplexity over words: pairs of log-likelihood and count, which no mean of items gives."""

    def perplexity(items: list[tuple[float, int]]) -> float:
        return math.exp(-sum(item[0] for item in items) / sum(item[1] for item in items))

    reference = [(-2.0 * n, n) for n in range(1, 30)]
    interval = paired_interval([(1.1 * total, n) for total, n in reference], reference, perplexity)
    assert interval is not None and interval.value == pytest.approx(math.exp(2.2) - math.exp(2))
    assert interval.low == pytest.approx(interval.high)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = list(np.random.default_rng(3).normal(size=50))
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5) != mean_interval(values, seed=6)


def test_too_little_and_too_different() -> None:
    assert mean_interval([1.0]) is None and mean_interval([]) is None and paired_interval([1], [1], sum) is None
    with pytest.raises(OptionError, match="not 2 and 3"):
        paired_interval([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(OptionError, match="no interval"):
        mean_interval([1.0, 2.0], confidence=1.0)
