"""SeerAttention (Gao et al. 2024) and SeerAttention-R (Gao et al. 2025): a small gate per layer learns where to look.

Prefill (2410.13276): queries of a block are averaged, keys of a block pooled by their maximum, minimum and mean, both
before rotary embedding; a matrix for each query head brings pooled keys to a head's width, both sides are rotated as
the first token of their block, and a softmax over their products says which blocks matter. Decoding (2506.08889): one
gate for each KV head, whose queries are the projected sum of the heads that share it, both sides normed. Gates are
trained while the model stays as it is: their softmax is to be that of the largest probabilities that attention has
within each block (for decoding: of each query, over the heads that share keys).
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from rarefy.attention.estimators.gated import Gated
from rarefy.attention.gate import BlockGate
from rarefy.attention.plan import AttentionShape
from rarefy.attention.policy import Phase
from rarefy.attention.selectors import Mass, Selector, Threshold, TopK
from rarefy.attention.summaries import Pool
from rarefy.contracts import GatedRecipe, attention_recipes
from rarefy.core.errors import RecipeError


@attention_recipes.register("seer_attention")
class SeerAttention(GatedRecipe):
    """A trained gate for each layer. Of each row's blocks the best ``density`` are kept; or those whose share by the
    gate exceeds ``threshold``; or as few as hold ``mass`` by it. ``budget``: while decoding, as many blocks as hold
    that many tokens instead (the paper has 4,096). ``pools``: what keys of a block are summed up by."""

    density: float = Field(0.1, gt=0, le=1)
    threshold: float | None = Field(None, gt=0, lt=1)
    budget: int | None = Field(None, ge=1)
    mass: float | None = Field(None, gt=0, le=1)
    pools: tuple[Pool, ...] = Field(("max", "min", "mean"), min_length=1)
    last_rows: int = Field(2, ge=0)

    @property
    def trained(self) -> tuple[Phase, ...]:
        """The phases that gates are trained for."""
        return ("prefill", "decode") if self.phases == "both" else (self.phases,)

    def new_gates(self, shape: AttentionShape) -> dict[Phase, BlockGate]:
        """Untrained gates of a layer."""
        maps = {"prefill": shape.heads if self.heads == "query" else shape.kv_heads, "decode": shape.kv_heads}
        return {
            phase: BlockGate.new(shape.heads, maps[phase], shape.channels, self.pools, phase == "decode")
            for phase in self.trained
        }

    def gates(self, params: Mapping[str, Tensor]) -> dict[Phase, BlockGate]:
        """The gates of a layer whose weights are ``params``."""
        return {phase: BlockGate.of(params, phase, self.pools) for phase in self.trained if f"{phase}.keys" in params}

    def estimator(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Gated:
        gates = self.gates(params)
        width = len(self.pools) * shape.channels
        for phase, gate in gates.items():
            if gate.keys.shape[1:] != (width, shape.channels):
                raise RecipeError(
                    f"The {phase} gate of layer {shape.layer} was trained for other pools or heads; train it anew."
                )
        return Gated(gates)

    def decode_selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Selector | None:
        return None if self.budget is None else TopK(count=-(-self.budget // self.block_k))

    def selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Selector:
        if self.threshold is not None:
            return Threshold(self.threshold)
        return TopK(self.density) if self.mass is None else Mass(self.mass)
