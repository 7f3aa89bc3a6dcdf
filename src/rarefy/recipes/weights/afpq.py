"""AFPQ (Zhang et al. 2023): float codes whose positive and negative halves have a scale each.

A group's largest and smallest weight are rarely opposite, and a float format has no zero point to shift it by: one
scale wastes codes on the shorter side. With ``scale+ = max(w, 0) / largest code`` and ``scale- = min(w, 0) / smallest
code`` (section 3.1) both sides are used to their ends; a clip search treats each side on its own. Codes are found by
any solver (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rarefy.contracts import Layer, Schedule, Solution, WeightRecipe, weight_recipes
from rarefy.core.config import parse
from rarefy.core.errors import RecipeError
from rarefy.formats.layout import FloatName
from rarefy.recipes.grids import GridRecipe
from rarefy.recipes.weights.awq import Awq
from rarefy.recipes.weights.gptq import Gptq
from rarefy.recipes.weights.rtn import Rtn

SOLVERS: dict[str, type[GridRecipe]] = {"rtn": Rtn, "gptq": Gptq, "awq": Awq}


@weight_recipes.register("afpq")
class Afpq(WeightRecipe):
    """A float format with a scale for each sign, solved by another recipe.

    ``solver``: ``rtn``, ``gptq`` or ``awq``, with its ``solver_options`` (``--set solver_options.clip=mse``).
    ``group_size`` null means one group per row;
    ``scales``: dtype of both scales of a group.
    """

    format: Literal["fp3", "fp4", "nf3", "nf4"] = "nf4"
    group_size: int | None = Field(128, ge=1)
    scales: FloatName = "float16"
    solver: Literal["rtn", "gptq", "awq"] = "gptq"
    solver_options: dict[str, Any] = Field(default_factory=dict)

    def model_post_init(self, context: object) -> None:
        given = self.solver_options.keys() & GridRecipe.model_fields.keys() - {"clip"}
        if given:
            raise RecipeError(f"Option '{min(given)}' describes the grid, which afpq decides; set it beside 'solver'.")
        self.base()

    def base(self) -> GridRecipe:
        """The solving recipe on the two-scale grid."""
        grid = {"format": self.format, "group_size": self.group_size, "scales": self.scales, "two_scales": True}
        what = f"Options of recipe '{self.solver}'"
        return parse(SOLVERS[self.solver], {**grid, **self.solver_options}, what, RecipeError)

    @property
    def needs(self) -> frozenset[str]:
        return self.base().needs

    def schedule(self) -> Schedule:
        return self.base().schedule()

    def input_scale(self, layers: Sequence[Layer]) -> Tensor | None:
        return self.base().input_scale(layers)

    def solve_group(self, layers: Sequence[Layer]) -> list[Solution]:
        return self.base().solve_group(layers)

    def solve(self, layer: Layer) -> Solution:
        return self.base().solve(layer)
