"""A recipe of your own in one file: round to nearest, with the largest weights corrected one by one.

Nothing in the package changes. Use it by name of the file:

    rarefy compress demo --recipe examples/outlier_rtn.py --set num_bits=3 --set outliers=0.01 --out my-model

An installed package offers its recipes to everybody by the entry point group ``rarefy.recipes`` instead.
"""

from __future__ import annotations

import torch
from pydantic import Field

from rarefy.contracts import Layer, Solution, WeightRecipe, weight_recipes
from rarefy.formats.grids import IntegerGrid
from rarefy.formats.terms import Residual
from rarefy.solvers.rtn import round_to_nearest


@weight_recipes.register("outlier_rtn")
class OutlierRtn(WeightRecipe):
    """``W = Quantized(W without outliers) + Residual``: the share ``outliers`` with the largest magnitude is exact.

    The grid is fitted without the outliers, so they do not widen anybody's steps; what they lack is stored in
    compressed sparse rows, 32 bits each.
    """

    num_bits: int = Field(3, ge=2, le=8)
    group_size: int | None = Field(128, ge=1)
    outliers: float = Field(0.005, ge=0, le=0.1)

    def solve(self, layer: Layer) -> Solution:
        weight = layer.weight
        grid = IntegerGrid(num_bits=self.num_bits, group_size=self.group_size, zero="integer")
        if weight.dim() == 3:
            return Solution([round_to_nearest(weight, grid)], ["experts are rounded without outliers"])
        count = round(self.outliers * weight.numel())
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[weight.abs().flatten().topk(count).indices] = True
        mask = mask.reshape(weight.shape)
        dense = round_to_nearest(weight.masked_fill(mask, 0.0), grid)
        return Solution([dense, Residual.from_weight(weight - dense.decode(), mask)])
