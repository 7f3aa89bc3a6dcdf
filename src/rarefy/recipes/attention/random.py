"""The lower bound of every estimator: sink, local blocks and others drawn at random."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from rarefy.attention.estimators import Noise
from rarefy.attention.plan import AttentionShape
from rarefy.attention.selectors import TopK
from rarefy.contracts import AttentionRecipe, attention_recipes


@attention_recipes.register("random")
class Random(AttentionRecipe):
    """``density`` of each row's blocks, sink and local ones among them, the others by ``seed``."""

    density: float = Field(0.1, gt=0, le=1)
    seed: int = 0

    def estimator(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Noise:
        return Noise(self.seed)

    def selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> TopK:
        return TopK(self.density)
