"""Sums that merge by addition, and the collection of them that belongs to one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rarefy.statistics.gradients import Fisher, Gradient
    from rarefy.statistics.inputs import ColumnMoments, Gram


class Statistic(ABC):
    """A few sums over data. Those of other data of the same layer are merged by adding ``sums`` one by one."""

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies: a collective may add to them in place."""

    @abstractmethod
    def unseen(self) -> Tensor:
        """Whether no data came: bool ``[]``, or ``[experts]``."""

    @abstractmethod
    def assume_uniform_(self) -> None:
        """Where no data came, what says nothing of any weight: every importance 1, no correlation. ``unseen`` and the
        counts stay; nothing may be added or merged afterwards."""

    def merge(self, other: Statistic) -> None:
        """Add what ``other`` saw of the same layer."""
        own, theirs = self.sums(), other.sums()
        assert own.keys() == theirs.keys()
        for name, tensor in own.items():
            tensor += theirs[name].to(tensor.device)


@dataclass
class Statistics:
    """What is known of one layer; None for what no recipe asked for.

    Layers that read the same input share the statistics of their inputs (the same objects); ``fisher`` and
    ``gradient`` are a layer's own.
    """

    gram: Gram | None = None
    columns: ColumnMoments | None = None
    fisher: Fisher | None = None
    gradient: Gradient | None = None

    @property
    def tokens(self) -> Tensor | None:
        """Calibration tokens that reached the layer: int64 ``[]`` or ``[experts]``; None without input statistics."""
        statistic = self.gram or self.columns
        return None if statistic is None else statistic.tokens

    def unseen(self) -> Tensor | None:
        """Whether data that a recipe asked for did not come: bool ``[]`` or ``[experts]``; None when nothing was asked
        for."""
        known = [own.unseen() for own in (self.gram, self.columns, self.fisher, self.gradient) if own is not None]
        return torch.stack(known).any(0) if known else None
