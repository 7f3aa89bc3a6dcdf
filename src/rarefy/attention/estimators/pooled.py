"""Scores from one key, or a range of keys, for each block."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.attention.call import Call, by_mask_head
from rarefy.attention.estimators.base import Estimator, Products, grouped, of_query_blocks, query_blocks
from rarefy.attention.estimators.simple import SCORES_AT_ONCE
from rarefy.attention.pooling import highest, lowest, mean, mean_and_similarity, pooled
from rarefy.attention.reach import Blocks


class PooledMeans(Estimator):
    """The mean query of a block times the mean key of the other.

    With ``likeness`` a mean has to be like what it stands for: key blocks whose tokens have a mean cosine of at most
    that are always kept, and query blocks likewise read all.
    """

    def __init__(self, likeness: float | None = None):
        self.likeness = likeness

    @property
    def label(self) -> str:
        return super().label + ("" if self.likeness is None else " with likeness")

    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        kept = self._kept(call, blocks.block_k)
        query, *alike = of_query_blocks(self._sums, call.query, blocks.block_q)
        scores = torch.matmul(grouped(query, call.source.heads), kept["mean"][:, :, None].mT).float() * call.scaling
        if self.likeness is not None:
            unlike = (kept["likeness"] <= self.likeness).mT[:, :, None]
            rows = grouped(alike[0] <= self.likeness, call.source.heads)
            scores = scores.masked_fill(unlike | rows, torch.inf)
        return by_mask_head(scores.flatten(1, 2), call, "max")

    def products(self, call: Call, block_k: int) -> Products | None:
        if self.likeness is not None:
            return None
        kept = self._kept(call, block_k, unfinished=False)
        return Products(call.query[:, :, 0], kept["mean"], call.scaling) if kept else None

    def _kept(self, call: Call, block_k: int, unfinished: bool = True) -> dict[str, Tensor]:
        name = f"means of {block_k}" + ("" if self.likeness is None else ", with likeness")
        return pooled(call.source, name, block_k, self._summary, valid=call.valid, unfinished=unfinished)

    def _sums(self, x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, ...]:
        return (mean(x, counts),) if self.likeness is None else mean_and_similarity(x, counts)

    def _summary(self, x: Tensor, counts: Tensor | None, begins: range) -> dict[str, Tensor]:
        return dict(zip(("mean", "likeness"), self._sums(x, counts), strict=False))


class Extremes(Estimator):
    """The greatest product that a key could have which lies between the least and greatest numbers of a block, channel
    by channel; of several queries the best."""

    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        kept = self._kept(call, blocks.block_k)
        queries, real = query_blocks(call.query, blocks.block_q)
        high, low = kept["high"][:, :, None].mT, kept["low"][:, :, None].mT
        batch, heads = call.query.shape[:2]
        at_once = max(1, SCORES_AT_ONCE // (batch * heads * blocks.block_q * blocks.columns))
        parts = []
        for first in range(0, blocks.rows, at_once):
            part = grouped(queries[:, :, first : first + at_once].flatten(2, 3), call.source.heads)
            bound = (part.clamp(min=0) @ high + part.clamp(max=0) @ low).float() * call.scaling
            bound = bound.flatten(1, 2).unflatten(2, (-1, blocks.block_q))
            if real is not None:
                bound = bound.masked_fill(~real[:, :, first : first + at_once], -torch.inf)
            parts.append(by_mask_head(bound.amax(3), call, "max"))
        return torch.cat(parts, 2)

    def products(self, call: Call, block_k: int) -> Products | None:
        kept = self._kept(call, block_k, unfinished=False)
        return Products(call.query[:, :, 0], kept["high"], call.scaling, kept["low"]) if kept else None

    def _kept(self, call: Call, block_k: int, unfinished: bool = True) -> dict[str, Tensor]:
        name = f"extremes of {block_k}"
        return pooled(call.source, name, block_k, self._summary, valid=call.valid, unfinished=unfinished)

    @staticmethod
    def _summary(x: Tensor, counts: Tensor | None, begins: range) -> dict[str, Tensor]:
        return {"high": highest(x, counts), "low": lowest(x, counts)}
