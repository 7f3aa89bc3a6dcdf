"""Attention sinks (StreamingLLM, Xiao et al. 2023): the first tokens and the nearest ones, and nothing between.

Softmax has to put its mass somewhere, and trained models put what nobody wants on the first tokens (section 3.1); with
those and a window of recent tokens a model stays fluent. It forgets what it read between, so it is the cheap control
that a plan with an estimator has to beat. Keys keep their positions here, as they do in prefill.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from rarefy.attention.estimators import Nearness
from rarefy.attention.plan import AttentionShape
from rarefy.attention.selectors import Selector, TopK
from rarefy.contracts import AttentionRecipe, attention_recipes


@attention_recipes.register("sink_local")
class SinkLocal(AttentionRecipe):
    """``sink`` first and ``local`` last blocks; or, to compare with other plans, the ``density`` of each row's blocks
    that are nearest."""

    local: int = Field(16, ge=1)
    density: float | None = Field(None, gt=0, le=1)

    def model_post_init(self, context: object) -> None:
        if self.density is not None and "local" not in self.model_fields_set:
            object.__setattr__(self, "local", 1)  # what is near then comes by its score

    def estimator(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Nearness:
        return Nearness()

    def selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Selector:
        if self.density is not None:
            return TopK(self.density)
        return TopK(count=0, least=0, include_forced=False)  # what is forced, as `Forced`, and known beforehand
