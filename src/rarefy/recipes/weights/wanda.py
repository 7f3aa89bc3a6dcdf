"""Wanda (Sun et al. 2023): drop the weights whose ``|w| * |x|`` is smallest in their row.

``|x|`` is the norm of the weight's input column over the calibration tokens (equation 1); nothing is updated.
"""

from __future__ import annotations

from typing import ClassVar

from rarefy.contracts import Layer, Solution, weight_recipes
from rarefy.recipes.pruning import PruningRecipe
from rarefy.saliency import magnitude, wanda
from rarefy.solvers.prune import prune


@weight_recipes.register("wanda")
class Wanda(PruningRecipe):
    """Pruning by magnitude times input norm, within each row or n:m group."""

    needs: ClassVar[frozenset[str]] = frozenset({"columns"})

    def solve(self, layer: Layer) -> Solution:
        columns = layer.statistics.columns
        scores = magnitude(layer.weight) if columns is None else wanda(layer.weight, columns.norm())
        return Solution([prune(layer.weight, scores, self.pattern(), self.sparsity, self.grid())])
