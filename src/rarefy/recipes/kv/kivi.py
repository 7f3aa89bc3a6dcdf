"""KIVI (Liu et al. 2024): keys lose least by channel, values by token.

Keys have channels that are large for every token, so each channel has a range of its own over ``group_size`` tokens;
values do not, and each token has ranges of its own over ``group_size`` channels. Codes are evenly spaced between a
group's minimum and maximum (section 3.2). Tokens that do not fill a block of keys yet, and the last ``residual``
values, stay in 16 bits (section 3.3). 2 bits suffice where every query head has a KV head of its own; 4 where heads
share.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from rarefy.contracts import KvRecipe, kv_recipes
from rarefy.core.errors import RecipeError
from rarefy.formats.grids import IntegerGrid
from rarefy.kv.codecs import Gridded
from rarefy.kv.plan import HeadShape, LayerCodecs


@kv_recipes.register("kivi")
class Kivi(KvRecipe):
    """Uniform codes, keys by channel and values by token. ``residual``: tokens of keys that are
    coded together, in 16 bits until there are as many; a multiple of ``group_size``."""

    num_bits: int = Field(4, ge=1, le=8)
    group_size: int = Field(32, ge=1)
    residual: int = Field(128, ge=1)

    def model_post_init(self, context: object) -> None:
        if self.residual % self.group_size:
            raise RecipeError(f"residual {self.residual} is no multiple of group_size {self.group_size}; change one.")

    def codecs(self, shape: HeadShape, params: Mapping[str, Tensor]) -> LayerCodecs:
        grid = IntegerGrid(num_bits=self.num_bits, group_size=self.group_size, zero="float")
        keys = Gridded(grid, "channel", self.residual, shape.key_channels)
        values = Gridded(grid, "token", self.group_size, shape.value_channels)
        return LayerCodecs(keys, values, self.sink, 0, self.residual)
