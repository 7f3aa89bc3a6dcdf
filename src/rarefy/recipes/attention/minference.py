"""MInference (Jiang et al. 2024): the vertical and slash lines that the last queries show.

The softmax of the last 64 queries over all keys tells which columns and which diagonals of a head's attention are heavy
(section 3.2); the best ``vertical`` columns and ``slash`` diagonals are kept for all queries, the first 30 columns and
the nearest 100 diagonals among them. Here blocks that such a line touches are read as a whole, so the density is what
the report says. The paper also searches, for each head, among patterns; this is its vertical-slash one. For prefill.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from rarefy.attention.estimators import Lines
from rarefy.attention.plan import AttentionShape
from rarefy.attention.selectors import Forced
from rarefy.contracts import AttentionRecipe, attention_recipes


@attention_recipes.register("minference")
class MInference(AttentionRecipe):
    """``vertical`` columns and ``slash`` diagonals."""

    vertical: int = Field(1000, ge=1)
    slash: int = Field(4096, ge=1)
    phases: Literal["both", "prefill", "decode"] = "prefill"

    def estimator(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Lines:
        return Lines(self.vertical, self.slash)

    def selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Forced:
        return Forced()
