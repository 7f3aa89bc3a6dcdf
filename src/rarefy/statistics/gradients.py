"""Gradients of a layer's weight, one sequence at a time.

Squaring the gradient of a whole batch is another, wrong quantity, and sums in 16 bits stall after a few hundred terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.statistics.base import Statistic


class GradientStatistic(Statistic):
    """A sum over sequences of a function of ``gradient [out, in]``, float32; sequences that are not finite are skipped
    and counted."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self.sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self.sequences = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._unseen: Tensor | None = None

    def update(self, gradient: Tensor) -> None:
        """Add the gradient of one sequence, in any floating dtype."""
        term = self._term(gradient.detach().to(self.sum))
        finite = term.sum().isfinite()  # one pass, where looking at each number takes six
        self.sum += torch.where(finite, term, 0.0)
        self.sequences += finite
        self.skipped += ~finite

    def _term(self, gradient: Tensor) -> Tensor:
        return gradient

    def unseen(self) -> Tensor:
        """Where all gradients are zero: no sequence reached that expert, or the loss does not depend on it."""
        return (self.sum == 0).flatten(-2).all(-1) if self._unseen is None else self._unseen

    def assume_uniform_(self) -> None:
        self._unseen = self.unseen()
        self.sum[self._unseen] = self.sequences.clamp(min=1).to(self.sum)

    def sums(self) -> dict[str, Tensor]:
        return {"sum": self.sum, "sequences": self.sequences, "skipped": self.skipped}

    def mean(self) -> Tensor:
        """``sum / sequences``, float32 of the weight's shape."""
        return self.sum / self.sequences.clamp(min=1)


class Gradient(GradientStatistic):
    """Sum of gradients of the loss."""


class Fisher(GradientStatistic):
    """Sum of squared gradients: the empirical Fisher information's diagonal (SqueezeLLM, Kim et al. 2023, eq. 4)."""

    def _term(self, gradient: Tensor) -> Tensor:
        return gradient.square()
