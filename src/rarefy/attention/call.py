"""One layer's attention in one pass, as estimators and executors are given it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rarefy.attention.policy import Phase
from rarefy.attention.reach import Reach
from rarefy.attention.source import Source
from rarefy.core.errors import UnsupportedError
from rarefy.kv.rotary import Rotary, unrotate


@dataclass(frozen=True)
class Call:
    """``query [B, H, Q, D]`` after rotary embedding, and the keys and values that it may reach. ``angles``: cos and sin
    ``[B or 1, Q, rotated channels]`` of the queries, which are the newest tokens; None where they are not known.
    ``positions`` int64 ``[B or 1, Q]`` beside them; ``find_rotary``: looks for what gives those angles. ``layer``: its
    number."""

    query: Tensor
    source: Source
    reach: Reach
    scaling: float
    layer: int = 0
    softcap: float | None = None
    angles: tuple[Tensor, Tensor] | None = None
    positions: Tensor | None = None
    find_rotary: Callable[[], Rotary | None] | None = None
    phase: Phase = "prefill"
    mask_heads: int = 1  # lists of blocks: one for each query head, or one for each KV head

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query.shape[1] // self.source.heads

    @cached_property
    def valid(self) -> Tensor | None:
        """Which keys are no padding, bool ``[B, keys]``; None where all are."""
        first, stop = self.reach.first, self.reach.stop
        if first is None and stop is None:
            return None
        place = torch.arange(self.reach.keys, device=self.query.device)
        valid = torch.ones(1, self.reach.keys, dtype=torch.bool, device=self.query.device)
        if first is not None:
            valid = valid & (place >= first[:, None])
        return valid if stop is None else valid & (place < stop[:, None])

    def query_before_rope(self) -> Tensor:
        """The queries as they were before rotary embedding, float32. Raises UnsupportedError where it is not known."""
        cos, sin = self.query_angles()
        return unrotate(self.query, cos[:, None], sin[:, None])

    def key_angles(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin ``[B or 1, n, rotated channels]``, float32, of the keys at ``places [n]``. Those of earlier
        passes are counted back from the newest token; places beyond it may have any."""
        if self.positions is None:
            return self.rotary.angles(places[None])
        new, newest = self.query.shape[2], self.source.length - 1
        index = places - newest + new - 1
        own = self.positions[:, index.clamp(0, new - 1)]  # of padding and packed sequences not what counting would give
        return self.rotary.angles(torch.where(index < 0, self.positions[:, -1:] + places - newest, own))

    def angles_of_blocks(self, begins: range) -> tuple[Tensor, Tensor]:
        """`key_angles` of all tokens of the blocks that begin there. Layers that share a reach share them."""
        # Kept beside what gave them, whose id is its name.
        rotary, places = self.rotary, torch.arange(begins.start, begins.stop, device=self.query.device)
        name = ("angles", begins, id(rotary.inv_freq), rotary.factor)
        return self.reach.once(name, lambda: (self.key_angles(places), rotary.inv_freq))[0]

    @cached_property
    def rotary(self) -> Rotary:
        """What gives the angles of any position. Raises UnsupportedError where nothing known does."""
        found = None if self.find_rotary is None else self.find_rotary()
        if found is None:
            raise UnsupportedError(
                f"The rotary embedding of layer {self.layer} is not one that can be computed anew; use another plan."
            )
        return found

    def query_angles(self) -> tuple[Tensor, Tensor]:
        """Cos and sin ``[B or 1, Q, rotated channels]`` of the queries. Raises UnsupportedError where they are not
        known."""
        if self.angles is None:
            raise UnsupportedError(
                f"Layer {self.layer} does not tell its rotary embedding, which this plan undoes; use another plan."
            )
        return self.angles


def by_mask_head(scores: Tensor, call: Call, how: str = "logsumexp") -> Tensor:
    """``scores [B, H, ...]`` of query heads as those of the call's mask heads, joined by ``logsumexp``, ``max`` or
    ``mean``."""
    if scores.shape[1] == call.mask_heads:
        return scores
    grouped = scores.unflatten(1, (call.mask_heads, -1))
    if how == "max":
        return grouped.amax(2)
    return grouped.mean(2) if how == "mean" else grouped.logsumexp(2)
