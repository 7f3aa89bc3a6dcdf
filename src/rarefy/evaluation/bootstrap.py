"""How sure a difference is: bootstrap intervals over the items that two models were both measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rarefy.core.config import StrictModel
from rarefy.core.errors import OptionError

Statistic = Callable[[list[Any]], float]
# Numbers drawn at once, so that many items do not need resamples * items of memory.
BLOCK = 1 << 22


class Interval(StrictModel):
    """An estimate and the interval that covers the true value with probability ``confidence``."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


def mean_interval(
    values: Sequence[float], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval | None:
    """The mean of ``values`` with its percentile bootstrap interval; None for fewer than two values.

    Percentile intervals of n items are too narrow by sqrt((n - 1) / n), so they are widened by that factor around the
    mean (Hesterberg, What Teachers Should Know About the Bootstrap, 2015). Right and wrong answers need some 40 items
    before the interval covers as often as it says.
    """
    _check(resamples, confidence)
    items = np.asarray(values, dtype=np.float64)
    if items.size < 2:
        return None
    rows = max(1, BLOCK // items.size)
    dice = np.random.default_rng(seed)
    means = np.concatenate(
        [
            items[dice.integers(items.size, size=(min(rows, resamples - start), items.size))].mean(1)
            for start in range(0, resamples, rows)
        ]
    )
    return _percentiles(float(items.mean()), means, items.size, confidence)


def paired_interval(
    ours: Sequence[Any],
    reference: Sequence[Any],
    statistic: Statistic | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """``statistic(ours) - statistic(reference)``, both resampled by the same items; None for fewer than two items.

    ``ours[i]`` and ``reference[i]`` belong to the same item. ``statistic`` maps a list of items to a number; None means
    the mean. Raises OptionError when the two are not of one length.
    """
    _check(resamples, confidence)
    if len(ours) != len(reference):
        raise OptionError(f"Paired intervals need the same items twice, not {len(ours)} and {len(reference)}.")
    if statistic is None:
        difference = np.asarray(ours, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
        return mean_interval(difference.tolist(), resamples=resamples, confidence=confidence, seed=seed)
    if len(ours) < 2:
        return None
    dice = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        chosen = dice.integers(len(ours), size=len(ours)).tolist()
        draws.append(statistic([ours[i] for i in chosen]) - statistic([reference[i] for i in chosen]))
    value = statistic(list(ours)) - statistic(list(reference))
    return _percentiles(value, np.asarray(draws), len(ours), confidence)


def _percentiles(value: float, draws: np.ndarray, count: int, confidence: float) -> Interval:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    widen = float(np.sqrt(count / (count - 1)))
    return Interval(
        value=value, low=value + widen * float(low - value), high=value + widen * float(high - value),
        confidence=confidence,
    )  # fmt: skip


def _check(resamples: int, confidence: float) -> None:
    if resamples < 1 or not 0 < confidence < 1:
        raise OptionError(f"{resamples} resamples at confidence {confidence} give no interval; use 1000 and 0.95.")
