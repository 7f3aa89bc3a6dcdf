"""What every selector does: turn scores into a choice of blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Selector(ABC):
    """A rule from scores to kept blocks. Equal scores are told apart by their place: the first key block wins."""

    def expected(self, columns: int) -> float | None:
        """The share of ``columns`` blocks that it will keep, but for forced ones; None where that depends on scores."""
        return None

    @abstractmethod
    def select(self, scores: Tensor, some: Tensor, forced: Tensor) -> Tensor:
        """Which blocks are kept, bool like ``scores [B, M, query blocks, key blocks]``: of those in reach (``some``)
        all that are ``forced`` and those that the rule chooses. Both are bool and broadcast."""

    def rule(self) -> dict[str, Any] | None:
        """The same rule as options of the kernel ``select_blocks``; None where it has none."""
        return None


class Forced(Selector):
    """What is forced, and blocks whose score is infinite; nothing else."""

    def rule(self) -> dict[str, Any]:
        return {"rule": "cut", "share": torch.inf, "normalized": False}

    def select(self, scores: Tensor, some: Tensor, forced: Tensor) -> Tensor:
        return ((scores == torch.inf) | forced) & some


class TopK(Selector):
    """The best blocks of each row: ``share`` of those in reach (rounded up) or ``count`` of them, at least ``least``.

    With ``include_forced`` blocks that are forced take places, so that the density is as asked; otherwise they come on
    top.
    """

    def __init__(
        self, share: float | None = None, count: int | None = None, *, least: int = 1, include_forced: bool = True
    ):
        assert (share is None) != (count is None)
        self.share, self.count, self.least, self.include_forced = share, count, least, include_forced

    def expected(self, columns: int) -> float | None:
        return self.share if self.share is not None else min(1.0, (self.count or 0) / max(columns, 1))

    def rule(self) -> dict[str, Any]:
        wanted = {"wanted": self.count} if self.share is None else {"share": self.share}
        return {"rule": "top", "least": self.least, "include_forced": self.include_forced, **wanted}

    def select(self, scores: Tensor, some: Tensor, forced: Tensor) -> Tensor:
        always = (forced | (scores == torch.inf)) & some
        given = torch.where(always, torch.inf if self.include_forced else -torch.inf, scores)
        given = given.masked_fill(~some, -torch.inf)
        seen = some.sum(-1, keepdim=True)
        if self.share is not None:
            wanted = (seen * self.share - 1e-6).ceil().long()
        else:
            wanted = torch.full_like(seen, self.count or 0)
        wanted = wanted.clamp(min=self.least)
        order = given.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        return (rank < wanted) & (given > -torch.inf) | always


class Mass(Selector):
    """The fewest blocks whose estimated shares reach ``mass`` of a row, forced ones first."""

    def __init__(self, mass: float):
        self.mass = mass

    def rule(self) -> dict[str, Any]:
        return {"rule": "mass", "share": self.mass}

    def select(self, scores: Tensor, some: Tensor, forced: Tensor) -> Tensor:
        always = (forced | (scores == torch.inf)) & some
        shares = _shares(scores, some)
        ranked = torch.where(always, torch.inf, torch.where(some, shares, -1.0))
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        sorted_shares = shares.gather(-1, order)
        before = sorted_shares.cumsum(-1) - sorted_shares  # what better blocks have
        chosen = torch.zeros_like(some & always).scatter_(-1, order, before < self.mass)
        return (chosen & some & (shares > 0)) | always


class Threshold(Selector):
    """Blocks whose score exceeds ``log(threshold)``. ``normalized``: scores become shares of their row first.
    ``threshold``: one number, or float32 ``[M]`` by mask head; 0 keeps all."""

    def __init__(self, threshold: float | Tensor, *, normalized: bool = True):
        self.threshold, self.normalized = threshold, normalized

    def rule(self) -> dict[str, Any]:
        limit = self.threshold
        own: dict[str, Any] = (
            {"limits": limit} if isinstance(limit, Tensor) and limit.dim() else {"share": float(limit)}
        )
        return {"rule": "cut", "normalized": self.normalized, **own}

    def select(self, scores: Tensor, some: Tensor, forced: Tensor) -> Tensor:
        limit = torch.as_tensor(self.threshold, device=scores.device, dtype=torch.float32)
        limit = limit.view(-1, 1, 1) if limit.dim() else limit
        values = _shares(scores, some) if self.normalized else scores
        cut = limit if self.normalized else limit.log()
        return ((values > cut) | (limit <= 0) | forced | (scores == torch.inf)) & some


def _shares(scores: Tensor, some: Tensor) -> Tensor:
    """Softmax over the blocks in reach whose score is finite; 0 for others and for rows without any."""
    finite = some & (scores < torch.inf) & (scores > -torch.inf)
    return torch.nan_to_num(scores.masked_fill(~finite, -torch.inf).softmax(-1))
