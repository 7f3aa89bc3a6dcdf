"""InfLLM v2 (MiniCPM team 2025, 2509.24663): blocks are found by means of overlapping windows of keys.

Keys are averaged over windows of 32, 16 apart; a query's softmax over those that it sees whole is added up over the
heads that share keys, and each block of 64 keys gets the largest sum of the windows that touch it. The first block and
the nearest ones are always read, besides the best others. The softmax's sum may come from longer windows, which spares
a second pass over the short ones. Nothing is added to the model, so that it can be trained to attend like this and
still attend densely: gradients go through the blocks that are read.

The paper lets each query choose for itself, in groups of 16 heads; with ``block_q`` 1 so does this. With fewer heads in
a group that leaves a GPU idle, so by default the queries of a block choose together in prefill, by each fourth of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from rarefy.attention.estimators.windowed import WindowMeans
from rarefy.attention.plan import AttentionShape
from rarefy.attention.selectors import Selector, TopK
from rarefy.contracts import AttentionRecipe, attention_recipes
from rarefy.core.errors import RecipeError


@attention_recipes.register("infllm_v2")
class InfLlmV2(AttentionRecipe):
    """Means of windows choose blocks. ``size`` and ``stride`` of windows in keys; ``coarse``: take the softmax's sum
    from windows four times as long. ``every``: of each block of queries only each so many-th is looked at. ``count``:
    blocks that are chosen, besides ``sink`` and ``local`` ones, or, with ``count_forced`` as in the released kernels,
    among them. ``density``: that share of each row's blocks instead."""

    heads: Literal["query", "kv"] = "kv"
    dense_below: int = Field(8192, ge=0)
    local: int = Field(32, ge=1)
    size: int = Field(32, ge=1)
    stride: int = Field(16, ge=1)
    coarse: bool = True
    every: int = Field(4, ge=1)
    count: int = Field(63, ge=0)
    count_forced: bool = False
    density: float | None = Field(None, gt=0, le=1)

    def model_post_init(self, context: object) -> None:
        if self.size % self.stride or self.block_k % self.stride:
            raise RecipeError(
                f"stride {self.stride} has to divide size {self.size} and block_k {self.block_k}; "
                f"set stride={math.gcd(self.size, self.block_k)}."
            )
        # The newest keys fill no window and are found by their place alone.
        if self.local < 2:
            raise RecipeError("The newest keys fill no window yet and are always read; set local=2 or more.")

    def estimator(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> WindowMeans:
        coarse = (4 * self.size, 4 * self.stride) if self.coarse else None
        return WindowMeans(self.size, self.stride, coarse, every=self.every)

    def selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Selector:
        if self.density is not None:
            return TopK(self.density)
        return TopK(count=self.count, least=0, include_forced=self.count_forced)
