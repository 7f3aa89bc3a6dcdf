"""GPTQ (Frantar et al. 2022): round column by column, and let the columns to come make up for what was lost.

``min |(W - Q) X|^2`` over codes, greedily: with ``U^T U = inverse(X X^T + damping)``, the error ``e = (w - q) / U_jj``
of column ``j`` is taken from every later column ``k`` as ``e U_jk`` (equations 2 to 4, in their Cholesky form). Columns
with the largest inputs come first; groups stay neighbouring columns, so that nothing is permuted at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from rarefy.contracts import Layer, Schedule, Solution, weight_recipes
from rarefy.recipes.grids import GridRecipe
from rarefy.solvers.gptq import gptq
from rarefy.solvers.hessian import inverse_hessian
from rarefy.solvers.rtn import round_to_nearest


@weight_recipes.register("gptq")
class Gptq(GridRecipe):
    """Rounding with error feedback.

    ``clip``: ``mse`` searches each group's range for the least error, a column counting by its mean squared input;
    ``none`` takes it from minimum to maximum, as in the paper. ``dampening``: share of the Hessian's mean diagonal
    added to it. ``act_order``: columns with larger inputs first. ``static_groups``: a group is neighbouring columns,
    fitted beforehand; without it groups follow the order of treatment, which is then stored. ``true_sequential``:
    layers see the compressed ones before them in their block.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    clip: Literal["none", "mse"] = "mse"
    dampening: float = Field(0.01, gt=0)
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = False

    def schedule(self) -> Schedule:
        return Schedule(true_sequential=self.true_sequential)

    def solve_group(self, layers: Sequence[Layer]) -> list[Solution]:
        gram = layers[0].statistics.gram
        if gram is None:
            return [
                Solution([round_to_nearest(layer.weight, self.grid(), search=self.search())]) for layer in layers
            ]
        inverse = inverse_hessian(gram, self.dampening, sort=self.act_order)
        weights = [layer.weight for layer in layers]
        solved = gptq(weights, inverse, self.grid(), search=self.search(), static_groups=self.static_groups)
        return [Solution(terms, inverse.notes) for terms in solved]

    def solve(self, layer: Layer) -> Solution:
        return self.solve_group([layer])[0]
