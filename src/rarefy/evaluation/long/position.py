"""Likelihood by position: how much each doubling of what came before helps, and the power law through it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from rarefy.core.config import StrictModel
from rarefy.evaluation.bootstrap import Interval, paired_interval

# Fewer documents than this make a bin of a curve too uncertain to publish.
ENOUGH = 30


class PowerLaw(StrictModel):
    """nll(x) = ``alpha`` * x ** ``beta`` + ``gamma``; ``error``: root mean squared residual in nats, weighted."""

    alpha: float
    beta: float
    gamma: float
    error: float


class PositionCurve(StrictModel):
    """Mean NLL in nats by position: ``bins`` [start, stop) double in width; ``by_document`` holds the mean of each
    document in each bin [documents][bins], the same documents in every bin; ``kl`` is the mean divergence from the
    reference by bin, None without one. ``fit`` is None for fewer than four bins."""

    bins: tuple[tuple[int, int], ...]
    by_document: tuple[tuple[float, ...], ...]
    kl: tuple[float, ...] | None
    fit: PowerLaw | None

    @property
    def nll(self) -> list[float]:
        """Mean over documents, by bin."""
        return [float(value) for value in np.mean(self.by_document, 0)]

    def change(self, reference: PositionCurve) -> list[Interval | None]:
        """NLL minus the reference's by bin, with paired intervals over documents."""
        return [
            paired_interval([row[bin] for row in self.by_document], [row[bin] for row in reference.by_document])
            for bin in range(len(self.bins))
        ]


def position_bins(length: int) -> tuple[tuple[int, int], ...]:
    """[16, 32), [32, 64), ... up to ``length``; the last may be cut short, but not below half of its width."""
    edges = [16]
    while edges[-1] * 2 <= length:
        edges.append(edges[-1] * 2)
    bins = list(itertools.pairwise(edges))
    if length - edges[-1] >= edges[-1] // 2:
        bins.append((edges[-1], length))
    return tuple(bins)


def position_curve(nll: np.ndarray, kl: np.ndarray | None) -> PositionCurve:
    """The curve of per-token ``nll`` and ``kl``, both [documents, length]; column p is the token at position p + 1."""
    bins = position_bins(nll.shape[1] + 1)
    means = np.stack([nll[:, start - 1 : stop - 1].mean(1) for start, stop in bins], 1)
    divergence = None if kl is None else tuple(float(kl[:, start - 1 : stop - 1].mean()) for start, stop in bins)
    return PositionCurve(
        bins=bins, by_document=tuple(tuple(map(float, row)) for row in means), kl=divergence,
        fit=fit_power_law([(start * stop) ** 0.5 for start, stop in bins], means),
    )  # fmt: skip


def fit_power_law(positions: Sequence[float], by_document: np.ndarray) -> PowerLaw | None:
    """The law through the means of ``by_document`` [documents, bins], weighted by 1 / variance of those means where
    there are documents enough to know it. None for fewer than four bins.

    beta is searched on a grid from -1 to -0.01, alpha and gamma are the least-squares solution for each (as in Gemini
    1.5, 2403.05530, section 5.2, whose curves have this form).
    """
    documents, bins = by_document.shape
    if bins < 4:
        return None
    mean = by_document.mean(0)
    weight = np.ones(bins)
    if documents >= ENOUGH:
        weight = 1 / np.maximum(by_document.var(0, ddof=1) / documents, 1e-12)
    weight = weight / weight.sum()
    x = np.asarray(positions, dtype=np.float64)
    best: PowerLaw | None = None
    for beta in np.linspace(-1, -0.01, 100):
        columns = np.stack([x**beta, np.ones(bins)], 1)
        root = np.sqrt(weight)
        (alpha, gamma), *_ = np.linalg.lstsq(columns * root[:, None], mean * root, rcond=None)
        error = float(np.sqrt((weight * (columns @ np.array([alpha, gamma]) - mean) ** 2).sum()))
        if best is None or error < best.error:
            best = PowerLaw(alpha=float(alpha), beta=float(beta), gamma=float(gamma), error=error)
    return best
