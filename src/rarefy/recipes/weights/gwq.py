"""GWQ (Shao et al. 2024): the weights with the largest gradients stay in 16 bits, the others share a grid per group.

The loss changes to first order by ``g_ij (q_ij - w_ij)``: the share of weights with the largest ``|g|``, the gradient
of one calibration sequence, are outliers. The grid of a group is fitted without them, and they are stored as what
their code lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy.contracts import Layer, Solution, weight_recipes
from rarefy.recipes.grids import GridRecipe
from rarefy.saliency import magnitude, obs, taylor
from rarefy.solvers.hessian import InverseHessian, inverse_hessian
from rarefy.solvers.masks import largest_of_each
from rarefy.solvers.outliers import round_around_outliers

NEEDS: dict[str, set[str]] = {
    "gradient": {"gradient"}, "taylor": {"gradient"}, "fisher": {"fisher"}, "hessian": {"gram"}, "magnitude": set(),
    "random": set(),
}  # fmt: skip


@weight_recipes.register("gwq")
class Gwq(GridRecipe):
    """Outliers by gradient, and a grid for the rest.

    ``outlier_share``: of a layer's weights that stay in 16 bits for their ``saliency``: ``gradient`` (its absolute mean
    over sequences: meant for one or few), ``taylor`` (that times the weight), ``fisher`` (mean square), ``hessian``
    (what losing the weight adds to the output error), ``magnitude`` or ``random``, the last two to compare with.
    ``magnitude_share``: of weights that stay for their size besides. ``clip``: ``mse`` searches each group's range for
    the least error of the others; ``none`` takes it from minimum to maximum. ``feedback``: round column by column with
    the error feedback of gptq; ``dampening`` is the share of the Hessian's mean diagonal added to it.
    """

    recipe_version: ClassVar[int] = 2  # ranges are searched

    outlier_share: float = Field(0.01, ge=0, le=0.1)
    magnitude_share: float = Field(0.0, ge=0, le=0.1)
    saliency: Literal["gradient", "taylor", "fisher", "hessian", "magnitude", "random"] = "gradient"
    clip: Literal["none", "mse"] = "mse"
    feedback: bool = False
    dampening: float = Field(0.01, gt=0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(NEEDS[self.saliency] | ({"gram"} if self.feedback else set()))

    def solve_group(self, layers: Sequence[Layer]) -> list[Solution]:
        gram = layers[0].statistics.gram if "gram" in self.needs else None
        inverse = None if gram is None else inverse_hessian(gram, self.dampening, sort=True)
        weights = [layer.weight for layer in layers]
        outliers = [
            largest_of_each(
                [(self._scores(layer, inverse), self.outlier_share), (magnitude(layer.weight), self.magnitude_share)],
                ties=magnitude(layer.weight),
            )
            for layer in layers
        ]
        feedback = inverse if self.feedback else None
        solved = round_around_outliers(weights, outliers, self.grid(), search=self.search(), inverse=feedback)
        notes = [] if inverse is None else inverse.notes
        return [
            Solution(terms, [*notes, *self._fallbacks(layer)]) for layer, terms in zip(layers, solved, strict=True)
        ]

    def solve(self, layer: Layer) -> Solution:
        return self.solve_group([layer])[0]

    def _fallbacks(self, layer: Layer) -> list[str]:
        """What was wanted and is not known of a layer."""
        known = {"gradient": layer.statistics.gradient, "fisher": layer.statistics.fisher}
        missing = [name for name, statistic in known.items() if name in self.needs and statistic is None]
        return [f"its {name} is not known; its largest weights are the outliers" for name in missing]

    def _scores(self, layer: Layer, inverse: InverseHessian | None) -> Tensor:
        """What a weight's loss would cost, by the wanted saliency; its magnitude where nothing is known of that."""
        weight, known = layer.weight, layer.statistics
        if self.saliency == "gradient" and known.gradient is not None:
            return known.gradient.mean().abs()
        if self.saliency == "taylor" and known.gradient is not None:
            return taylor(weight, known.gradient.mean())
        if self.saliency == "fisher" and known.fisher is not None:
            return known.fisher.mean()
        if self.saliency == "hessian" and inverse is not None:
            scale = inverse.in_place(inverse.scales)
            return obs(weight, scale[:, None] if weight.dim() == 3 else scale)
        return torch.rand_like(weight) if self.saliency == "random" else magnitude(weight)
