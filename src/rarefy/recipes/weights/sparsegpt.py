"""SparseGPT (Frantar and Alistarh 2023): drop weights column by column, and let the columns to come make up for it.

A weight's score is ``w^2 / U_jj^2``, what its loss costs after the best correction of later columns (equation 3, with
``U^T U = inverse(X X^T + damping)``); the lowest of each stretch of 128 columns, or of each n:m group, are dropped
when their turn comes. With ``num_bits`` what stays is rounded in the same pass (section 4.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from rarefy.contracts import Layer, Schedule, Solution, weight_recipes
from rarefy.recipes.pruning import PruningRecipe
from rarefy.saliency import magnitude, obs
from rarefy.solvers.hessian import inverse_hessian
from rarefy.solvers.prune import prune
from rarefy.solvers.sparsegpt import prune_with_feedback


@weight_recipes.register("sparsegpt")
class SparseGpt(PruningRecipe):
    """Pruning with error feedback. ``dampening``: share of the Hessian's mean diagonal added to it.
    ``true_sequential``: layers see the compressed ones before them in their block."""

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    dampening: float = Field(0.01, gt=0)
    true_sequential: bool = False

    def schedule(self) -> Schedule:
        return Schedule(true_sequential=self.true_sequential)

    def solve_group(self, layers: Sequence[Layer]) -> list[Solution]:
        gram, grid, pattern = layers[0].statistics.gram, self.grid(), self.pattern()
        weights = [layer.weight for layer in layers]
        if gram is None:
            return [Solution([prune(weight, magnitude(weight), pattern, self.sparsity, grid)]) for weight in weights]
        inverse = inverse_hessian(gram, self.dampening)
        solved = prune_with_feedback(weights, inverse, obs, pattern=pattern, sparsity=self.sparsity, grid=grid)
        return [Solution(terms, inverse.notes) for terms in solved]

    def solve(self, layer: Layer) -> Solution:
        return self.solve_group([layer])[0]
