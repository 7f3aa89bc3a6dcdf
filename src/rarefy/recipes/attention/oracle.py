"""The upper bound of every estimator: blocks chosen by what dense attention really gives them.

Attention is computed in full to know the blocks, and then again over those alone, so this is slower than dense; it says
how much any choice of that many blocks can keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from rarefy.attention.estimators import TrueMass
from rarefy.attention.plan import AttentionShape
from rarefy.attention.selectors import Mass, Selector, TopK
from rarefy.contracts import AttentionRecipe, attention_recipes


@attention_recipes.register("oracle")
class Oracle(AttentionRecipe):
    """The best ``density`` of each row's blocks, or as few as hold ``mass`` of its attention where that is given.
    ``reduce``: whether a block counts by its mass or by its greatest probability."""

    density: float = Field(0.1, gt=0, le=1)
    mass: float | None = Field(None, gt=0, le=1)
    reduce: Literal["mass", "max"] = "mass"

    def estimator(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> TrueMass:
        return TrueMass(self.reduce)

    def selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Selector:
        return TopK(self.density) if self.mass is None else Mass(self.mass)
