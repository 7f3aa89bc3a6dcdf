"""SALE (2505.24179): every query meets every key in 4 bits, and a threshold for each head says what is worth reading.

Queries and keys lose their means and are rounded to 4 bits; the mean of queries adds an exact number to each key's
score. The first keys and the nearest ones are read exactly, and what they add up to is the measure: a tile of 64
queries and 32 keys is read if any estimated weight in it exceeds the head's threshold, relative to that sum. Thresholds
are calibrated layer by layer on dense attention: they start at ``start`` and are halved until the head's output is
close enough to the dense one.

Closeness is relative here (sum of absolute differences over that of the dense output, below ``budget``): the paper's
absolute bound is loose for heads with small values. And ``start`` is 16 times the paper's: at short lengths a relative
weight of 0.008 is common, and the budget would never be spent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.estimators.low_bit import LowBitProducts
from rarefy.attention.plan import AttentionShape
from rarefy.attention.selectors import Selector, Threshold
from rarefy.attention.thresholds import head_errors, largest_within
from rarefy.contracts import AttentionRecipe, attention_recipes


@attention_recipes.register("sale")
class Sale(AttentionRecipe):
    """Thresholds on 4-bit scores, for prefill. ``num_bits`` of queries and keys, which lose their mean over tokens
    before when ``smooth``; ``every``: of each block of queries only each so many-th is looked at (1: all, as in the
    paper). ``budget``: error of a head's output that calibration allows, in the mean of its sequences and one standard
    deviation above it; ``start`` and ``halvings``: the thresholds that it tries. ``threshold``: that one for all heads,
    without calibration."""

    block_k: int = Field(32, ge=1)
    local: int = Field(5, ge=1)
    dense_below: int = Field(1024, ge=0)
    phases: Literal["both", "prefill", "decode"] = "prefill"
    num_bits: int = Field(4, ge=2, le=8)
    smooth: bool = True
    every: int = Field(4, ge=1)
    budget: float = Field(0.05, gt=0)
    start: float = Field(0.128, gt=0, lt=1)
    halvings: int = Field(12, ge=0)
    threshold: float | None = Field(None, ge=0, lt=1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples"} if self.threshold is None else ())

    @property
    def levels(self) -> list[float]:
        """The thresholds that calibration tries, falling; 0 keeps every block."""
        return [*(self.start / 2**halving for halving in range(self.halvings)), 0.0]

    def estimator(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> LowBitProducts:
        near = (self.local - 1) * self.block_k
        return LowBitProducts(
            num_bits=self.num_bits, sink=self.sink * self.block_k, local=near, smooth=self.smooth, every=self.every
        )

    def selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Selector:
        limit = params["threshold"] if self.threshold is None else self.threshold
        return Threshold(limit, normalized=False)

    def measure(self, shape: AttentionShape, call: Call) -> dict[str, Tensor]:
        plans = [self.model_copy(update={"threshold": level}).plan(shape, {}) for level in self.levels]
        apart, whole = head_errors(plans, call)
        error = apart / whole.clamp(min=math.ulp(0.0))
        return {"apart": apart, "whole": whole, "error": error, "square": error.square(), "count": torch.ones(())}

    def fit(self, shape: AttentionShape, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        errors = sums["apart"] / sums["whole"].clamp(min=math.ulp(0.0))
        count = int(sums["count"])
        if count > 1:
            # Other texts err more or less than these do in the mean: as much more as these differ is allowed for.
            variance = (sums["square"] - sums["error"].square() / count) / (count - 1)
            errors = errors + variance.clamp(min=0.0).sqrt()
        return {"threshold": largest_within(torch.tensor(self.levels), errors, self.budget)}
