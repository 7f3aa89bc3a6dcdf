"""GEAR (Kang et al. 2024): uniform codes, and the two parts of their error that are cheap to store.

``X = codes + S + L`` (equation 3): a few extreme entries ``S`` of each vector leave before its range is found, and of
the error that remains a rank-``rank`` matrix ``L`` is stored for each head and block, by power iteration (algorithm 2).
Keys are coded by channel over ``group_size`` tokens, values by token over ``group_size`` channels; a block of ``block``
tokens is coded when it is full and never again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from rarefy.contracts import KvRecipe, kv_recipes
from rarefy.formats.grids import IntegerGrid
from rarefy.kv.codecs import Gridded, LowRank, Residual, Sparse, Trimmed
from rarefy.kv.codecs.plain import Axis
from rarefy.kv.plan import HeadShape, LayerCodecs


@kv_recipes.register("gear")
class Gear(KvRecipe):
    """Uniform codes with sparse and low-rank corrections. ``block``: tokens that are coded together. ``outliers``:
    share of each vector (a channel of keys over a block's tokens, a token of values) that is stored as its error.
    ``rank`` of the correction of a block, found in so many ``iterations``. ``recent``: newest tokens that stay in 16
    bits."""

    num_bits: int = Field(2, ge=1, le=8)
    group_size: int = Field(64, ge=1)
    block: int = Field(128, ge=1)
    rank: int = Field(2, ge=0)
    outliers: float = Field(0.02, ge=0, le=0.5)
    iterations: int = Field(3, ge=1)
    recent: int = Field(0, ge=0)

    def codecs(self, shape: HeadShape, params: Mapping[str, Tensor]) -> LayerCodecs:
        keys, values = self._side("channel", shape.key_channels), self._side("token", shape.value_channels)
        return LayerCodecs(keys, values, self.sink, self.recent, self.recent)

    def _side(self, axis: Axis, channels: int) -> Residual:
        grid = IntegerGrid(num_bits=self.num_bits, group_size=self.group_size, zero="float")
        count = math.ceil(self.outliers * (self.block if axis == "channel" else channels) / 2)
        parts = [Trimmed(Gridded(grid, axis, self.block, channels), count, axis)]
        sparse = [Sparse(2 * count, axis, self.block, channels)] if count else []
        low_rank = [LowRank(self.rank, self.block, channels, self.iterations)] if self.rank else []
        return Residual(*parts, *sparse, *low_rank)
