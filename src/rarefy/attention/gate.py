"""A learned gate: summaries of key blocks and queries, each through a small matrix, scored by their product."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rarefy.attention.summaries import Pool
from rarefy.kv.rotary import Rotary

EPSILON = 1e-6
# What a gate is to say of a block: its largest probability, the sum of all, or the mean of both shares.
Truth = Literal["max", "mass", "both"]

# Of a new gate, normed or not: how much of a product of means its scores are. Found on a small model.
SHARPNESS = {False: 0.5, True: 1.0}


@dataclass(frozen=True)
class BlockGate:
    """Scores of key blocks, from queries and keys as they are before rotary embedding, for ``maps`` maps: one for each
    query head, whose queries go in as they are, or one for all query heads that share keys, whose queries are projected
    and added up.

    ``keys [maps, pools * D, D]`` projects what sums up a block of keys (``pools`` of each channel); ``queries [maps,
    heads of a map, D, D]``, or None. Both are then rotated, keys as their block's first token would be. With ``gain
    [maps, D]`` both are brought to unit mean square before that, and queries multiplied by it.
    """

    keys: Tensor
    queries: Tensor | None
    gain: Tensor | None
    pools: tuple[Pool, ...]

    @classmethod
    def new(cls, heads: int, maps: int, channels: int, pools: tuple[Pool, ...], normed: bool) -> BlockGate:
        """A gate to be trained, float32 on the CPU. It begins as the product of mean queries and mean keys (or what of
        ``pools`` is nearest to a mean), which is better than chance, and from where it learns faster than from random
        weights."""
        sharpness, one = SHARPNESS[normed], torch.eye(channels)
        middle = [pool == "mean" for pool in pools] if "mean" in pools else [True] * len(pools)
        share = (1.0 if normed else sharpness) / sum(middle)
        keys = torch.cat([one * share if used else torch.zeros_like(one) for used in middle]).repeat(maps, 1, 1)
        shared = heads // maps
        queries = (one / shared).repeat(maps, shared, 1, 1) if shared > 1 else None
        return cls(keys, queries, torch.full((maps, channels), sharpness) if normed else None, pools)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], lead: str, pools: tuple[Pool, ...]) -> BlockGate:
        """The gate whose weights are ``tensors`` with names that begin with ``lead``."""
        return cls(tensors[f"{lead}.keys"], tensors.get(f"{lead}.queries"), tensors.get(f"{lead}.gain"), pools)

    @classmethod
    def join(cls, gates: Sequence[BlockGate]) -> BlockGate:
        """Gates of one kind side by side, for queries and summaries whose heads lie side by side too."""

        def side_by_side(name: str) -> Tensor | None:
            parts = [getattr(gate, name) for gate in gates]
            return None if parts[0] is None else torch.cat(parts)

        keys = side_by_side("keys")
        assert keys is not None
        return cls(keys, side_by_side("queries"), side_by_side("gain"), gates[0].pools)

    @property
    def maps(self) -> int:
        return self.keys.shape[0]

    @property
    def scaling(self) -> float:
        """What products of queries and summaries are multiplied by."""
        return 1 / math.sqrt(self.keys.shape[2])

    def tensors(self, lead: str) -> dict[str, Tensor]:
        """What `of` reads."""
        own = {"keys": self.keys, "queries": self.queries, "gain": self.gain}
        return {f"{lead}.{name}": tensor for name, tensor in own.items() if tensor is not None}

    def compress(self, summary: Tensor, places: Tensor, rotary: Rotary | None) -> Tensor:
        """What stands for blocks with these ``summaries.summaries`` that begin at ``places [N]``: float32 ``[B, maps,
        N, D]``."""
        # Maps that read the same keys side by side, so that summaries are read once.
        keys = self.keys.unflatten(0, (summary.shape[1], -1)).transpose(1, 2)
        found = _product(summary, keys.flatten(2).expand(summary.shape[0], -1, -1, -1)).unflatten(3, keys.shape[2:])
        return self._placed(found.transpose(2, 3).flatten(1, 2), places, rotary)

    def ask(self, query: Tensor, places: Tensor, rotary: Rotary | None) -> Tensor:
        """What stands for queries ``[B, H, n, D]`` (tokens, or means of blocks of them) at ``places [n]``: float32
        ``[B, maps, n, D]``."""
        if self.queries is None:
            asked = query.float()
        else:
            asked = torch.matmul(query.float().unflatten(1, (self.maps, -1)), self.queries.float()).sum(2)
        return self._placed(asked, places, rotary, self.gain)

    def score(self, asked: Tensor, compressed: Tensor) -> Tensor:
        """Scores ``[B, maps, n, N]``, float32, of which a softmax over blocks is taken."""
        return _product(asked * self.scaling, compressed.mT)

    def _placed(self, x: Tensor, places: Tensor, rotary: Rotary | None, gain: Tensor | None = None) -> Tensor:
        if self.gain is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)
        if gain is not None:
            x = x * gain.float()[:, None]
        return x if rotary is None else rotary.rotate(x, places[None])


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``x [B, M, n, k]``, float32, times ``y [B, M, k, m]``, float32: in the 16 bits that ``y`` has, where a GPU adds
    them up in 32."""
    if y.is_cuda and y.dtype in (torch.bfloat16, torch.float16) and not (x.requires_grad or y.requires_grad):
        narrow = torch.bmm(x.to(y.dtype).flatten(0, 1), y.flatten(0, 1), out_dtype=torch.float32)
        return narrow.unflatten(0, x.shape[:2])
    return torch.matmul(x, y.float())
