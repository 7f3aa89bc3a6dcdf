"""XAttention (Xu et al. 2025): blocks by the sums of their antidiagonals.

Each tile of ``stride`` by ``stride`` tokens counts by the sum of the scores along its antidiagonal (section 2.1), which
crosses every vertical and every slanted line; the sums are one product of folded queries and keys at 1 / stride of the
cost of all scores. Their softmax, summed in blocks, says which have ``mass`` of a row's attention (equation 3), first
block and diagonal among them. For prefill.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from rarefy.attention.estimators import Antidiagonals
from rarefy.attention.plan import AttentionShape
from rarefy.attention.selectors import Mass, Selector, TopK
from rarefy.contracts import AttentionRecipe, attention_recipes


@attention_recipes.register("xattention")
class XAttention(AttentionRecipe):
    """``stride`` of the antidiagonals. ``mass``: share of a row's estimated attention to keep; or ``density``: share of
    blocks, where that is given."""

    stride: int = Field(8, ge=1)
    mass: float = Field(0.9, gt=0, le=1)
    density: float | None = Field(None, gt=0, le=1)
    block_q: int = Field(128, ge=1)
    block_k: int = Field(128, ge=1)
    phases: Literal["both", "prefill", "decode"] = "prefill"

    def estimator(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Antidiagonals:
        return Antidiagonals(self.stride)

    def selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Selector:
        return Mass(self.mass) if self.density is None else TopK(self.density)
