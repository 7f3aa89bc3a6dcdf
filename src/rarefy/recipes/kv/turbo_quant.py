"""TurboQuant (Zandieh et al. 2025): any vector, turned at random, is Gaussian enough for one table.

A rotation spreads a head's vector evenly over its coordinates, which are then nearly normal with variance 1 / D; the
best table of ``2 ** num_bits`` values for that distribution (Lloyd 1982, Max 1960) needs no calibration and no ranges,
only the vector's norm. Two things follow later practice: the norm stored is that which gives the decoded vector the
length of the original, and there is no extra bit that makes inner products unbiased, since attention suffers from its
variance.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from rarefy.contracts import KvRecipe, kv_recipes
from rarefy.formats.grids.lut import lloyd
from rarefy.kv.codecs import NormTable, Rotated
from rarefy.kv.plan import HeadShape, LayerCodecs


@kv_recipes.register("turbo_quant")
class TurboQuant(KvRecipe):
    """A Gaussian table on rotated vectors. ``value_bits``: of values where they differ from keys. ``recent``: newest
    tokens that stay in 16 bits."""

    num_bits: int = Field(4, ge=1, le=8)
    value_bits: int | None = Field(None, ge=1, le=8)
    recent: int = Field(0, ge=0)

    def codecs(self, shape: HeadShape, params: Mapping[str, Tensor]) -> LayerCodecs:
        widths = (self.num_bits, shape.key_channels), (self.value_bits or self.num_bits, shape.value_channels)
        keys, values = (Rotated(NormTable(gaussian_table(bits), 32, channels), channels) for bits, channels in widths)
        return LayerCodecs(keys, values, self.sink, self.recent, self.recent)


@functools.cache
def gaussian_table(num_bits: int) -> Tensor:
    """The ``2 ** num_bits`` values of least squared error for a standard normal number, float32, ascending."""
    count = 1 << 16
    points = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()
    table = lloyd(points[None], None, 1 << num_bits, steps=300)[0]
    return (table - table.flip(0)) / 2
