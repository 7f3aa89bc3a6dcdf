"""Round to nearest (no paper): the baseline that every other recipe is held against.

Each group of ``group_size`` inputs of a row gets its own parameters from its own values; each weight takes the nearest
value. Any grid can be used; ``clip`` searches the range with the least error (GPTQ's reference quantizer, norm 2.4).
Needs no data, so it streams any checkpoint shard by shard.
"""

from __future__ import annotations

from typing import ClassVar

from rarefy.contracts import Layer, Solution, weight_recipes
from rarefy.recipes.grids import GridRecipe
from rarefy.solvers.rtn import round_to_nearest


@weight_recipes.register("rtn")
class Rtn(GridRecipe):
    """Round to nearest on one grid."""

    recipe_version: ClassVar[int] = 3  # two-level scales take 4 bits; tables start from finer cuts

    def solve(self, layer: Layer) -> Solution:
        return Solution([round_to_nearest(layer.weight, self.grid(), search=self.search())])
