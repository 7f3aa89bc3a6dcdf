"""8-bit floats (Micikevicius et al. 2022): half the bytes of a 16-bit cache, and what serving engines offer.

Each token's vector of each head is scaled so that its largest number is the format's largest: 8 + 16 / D bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from rarefy.contracts import KvRecipe, kv_recipes
from rarefy.formats.grids import FloatGrid
from rarefy.kv.codecs import Gridded
from rarefy.kv.plan import HeadShape, LayerCodecs


@kv_recipes.register("fp8")
class Fp8(KvRecipe):
    """8-bit floats. ``format``: of both keys and values. ``recent``: newest tokens that stay in 16 bits."""

    format: Literal["fp8_e4m3", "fp8_e5m2"] = "fp8_e4m3"
    recent: int = Field(0, ge=0)

    def codecs(self, shape: HeadShape, params: Mapping[str, Tensor]) -> LayerCodecs:
        grid = FloatGrid(format=self.format)
        keys = Gridded(grid, "token", 32, shape.key_channels)
        values = Gridded(grid, "token", 32, shape.value_channels)
        return LayerCodecs(keys, values, self.sink, self.recent, self.recent)
