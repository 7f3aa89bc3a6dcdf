"""SpargeAttn (Zhang et al. 2025): mean queries times mean keys, where a mean says something.

A block's mean stands for it only if its tokens are alike: blocks of keys with a mean cosine of at most ``similarity``
are always kept, and blocks of queries that unlike read everything (section 3.2). Among the others, softmax over the
products of means says which have ``mass`` of a row. Its 8-bit products and the skipping of values are not part of this.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from rarefy.attention.estimators import PooledMeans
from rarefy.attention.plan import AttentionShape
from rarefy.attention.selectors import Mass, Selector, TopK
from rarefy.contracts import AttentionRecipe, attention_recipes


@attention_recipes.register("sparge")
class Sparge(AttentionRecipe):
    """``mass``: share of a row's estimated attention to keep; or ``density``: share of blocks, where that is given.
    With a ``similarity`` of -1 every mean is believed."""

    similarity: float = Field(0.6, ge=-1, le=1)
    mass: float = Field(0.98, gt=0, le=1)
    density: float | None = Field(None, gt=0, le=1)

    def estimator(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> PooledMeans:
        return PooledMeans(None if self.similarity <= -1 else self.similarity)

    def selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Selector:
        return Mass(self.mass) if self.density is None else TopK(self.density)
