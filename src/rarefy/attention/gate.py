"""A learned gate: summaries of key blocks and queries, each through a small matrix, scored by their product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.attention.summaries import Pool
from rarefy.kv.rotary import Rotary

EPSILON = 1e-6


@dataclass(frozen=True)
class BlockGate:
    """Scores of key blocks, from queries and keys as they are before rotary embedding, for ``maps`` maps: one for each
    query head, whose queries go in as they are, or one for all query heads that share keys, whose queries are projected
    and added up.

    ``keys [maps, pools * D, D]`` projects what sums up a block of keys (``pools`` of each channel); ``queries [maps,
    heads of a map, D, D]``, or None. Both are then rotated, keys as their block's first token would be. ``normed``:
    brought to unit mean square before that.
    """

    keys: Tensor
    queries: Tensor | None
    pools: tuple[Pool, ...]
    normed: bool

    @classmethod
    def new(
        cls, heads: int, maps: int, channels: int, pools: tuple[Pool, ...], normed: bool, generator: torch.Generator
    ) -> BlockGate:
        """A gate with weights drawn uniformly as Glorot and Bengio have it, float32 on the CPU."""
        keys = _drawn((maps, len(pools) * channels, channels), generator)
        shared = heads // maps
        queries = _drawn((maps, shared, channels, channels), generator) if shared > 1 else None
        return cls(keys, queries, pools, normed)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], lead: str, pools: tuple[Pool, ...], normed: bool) -> BlockGate:
        """The gate whose weights are ``tensors`` with names that begin with ``lead``."""
        return cls(tensors[f"{lead}.keys"], tensors.get(f"{lead}.queries"), pools, normed)

    @property
    def maps(self) -> int:
        return self.keys.shape[0]

    def tensors(self, lead: str) -> dict[str, Tensor]:
        """What `of` reads."""
        found = {f"{lead}.keys": self.keys}
        return found if self.queries is None else {**found, f"{lead}.queries": self.queries}

    def compress(self, summary: Tensor, places: Tensor, rotary: Rotary | None) -> Tensor:
        """What stands for blocks with these ``summaries.summaries`` that begin at ``places [N]``: float32 ``[B, maps,
        N, D]``."""
        wide = summary.repeat_interleave(self.maps // summary.shape[1], 1)
        return self._placed(torch.matmul(wide, self.keys.float()), places, rotary)

    def ask(self, query: Tensor, places: Tensor, rotary: Rotary | None) -> Tensor:
        """What stands for queries ``[B, H, n, D]`` (tokens, or means of blocks of them) at ``places [n]``: float32
        ``[B, maps, n, D]``."""
        if self.queries is None:
            asked = query.float()
        else:
            asked = torch.matmul(query.float().unflatten(1, (self.maps, -1)), self.queries.float()).sum(2)
        return self._placed(asked, places, rotary)

    def score(self, asked: Tensor, compressed: Tensor) -> Tensor:
        """Scores ``[B, maps, n, N]``, float32, of which a softmax over blocks is taken."""
        return torch.matmul(asked, compressed.float().mT) / math.sqrt(asked.shape[-1])

    def _placed(self, x: Tensor, places: Tensor, rotary: Rotary | None) -> Tensor:
        if self.normed:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)
        return x if rotary is None else rotary.rotate(x, places[None])


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / (shape[-2] + shape[-1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
