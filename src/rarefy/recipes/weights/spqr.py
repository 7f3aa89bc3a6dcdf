"""SpQR (Dettmers et al. 2023): tiny groups with quantized scales, error feedback, and the worst weights in 16 bits.

Groups of 16 inputs get a scale and a real-valued zero, which are themselves low-bit numbers of a grid over 16 rows
(section 4.2, "bilevel"); their codes are those with which the group is rounded best, rather than the nearest to the
range of its values. Columns are rounded as by GPTQ; a weight whose error would cost more than a threshold,
``(e / U_jj)^2 > tau``, stays in 16 bits, and one that would spoil its group's range (leaving it out lowers the group's
cost by more than tau) takes no part in fitting it (algorithm 1). Outliers are stored as what their code lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from rarefy.contracts import Layer, Schedule, Solution, WeightRecipe, weight_recipes
from rarefy.core.errors import RecipeError
from rarefy.formats.bytes import total
from rarefy.formats.grids import IntegerGrid
from rarefy.formats.scales import BilevelScale
from rarefy.solvers.clip import ClipSearch
from rarefy.solvers.hessian import inverse_hessian
from rarefy.solvers.outliers import gptq_with_outliers
from rarefy.solvers.rtn import round_to_nearest
from rarefy.solvers.search import bisect_falling

# A group is judged by the error that its output would have if columns had nothing to do with each other.
SQUARED = 2.0
# Layers on which a threshold is found for wanted bits, and between which thresholds.
SAMPLED, THRESHOLDS, TOLERANCE = 8, (1e-3, 10.0), 0.005


@weight_recipes.register("spqr")
class Spqr(WeightRecipe):
    """Small groups with two-level scales, error feedback and outliers.

    ``true_sequential``: layers see the compressed ones before them in their block.
    ``outlier_threshold``: in units of a column's mean cost of being lost; smaller means more outliers, null none.
    ``target_bits``: bits per weight, all things counted, for which a threshold is found on a few layers instead.
    ``scale_bits``, ``zero_bits`` and ``scale_rows``: of the second level; up to 4 bits of each are stored in 4.
    ``act_order``: columns with larger inputs first, stored in that order. ``dampening``: share of the Hessian's mean
    diagonal added to it. ``clip``: "mse" searches each group's range and, up to 4 bits, its codes of the second level;
    "none" takes all of the range and the nearest codes, as published.
    """

    recipe_version: ClassVar[int] = 3  # scales and zeros take 4 bits, and their codes are searched
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    num_bits: int = Field(3, ge=2, le=8)
    group_size: int = Field(16, ge=2)
    scale_bits: int = Field(4, ge=1, le=8)
    zero_bits: int = Field(4, ge=1, le=8)
    scale_rows: int = Field(16, ge=1)
    outlier_threshold: float | None = Field(0.2, gt=0)
    target_bits: float | None = Field(None, gt=0)
    clip: Literal["none", "mse"] = "mse"
    act_order: bool = True
    dampening: float = Field(0.1, gt=0)
    true_sequential: bool = False

    @property
    def sample_layers(self) -> int:
        return 0 if self.target_bits is None else SAMPLED

    def schedule(self) -> Schedule:
        return Schedule(true_sequential=self.true_sequential)

    def grid(self) -> IntegerGrid:
        """Even steps with a real zero, both on two levels."""
        scales = BilevelScale(scale_bits=self.scale_bits, zero_bits=self.zero_bits, rows=self.scale_rows)
        return IntegerGrid(num_bits=self.num_bits, group_size=self.group_size, zero="float", scales=scales)

    def prepare(self, samples: Sequence[Layer]) -> Spqr:
        """With the threshold that brings ``samples`` to ``target_bits``."""
        if self.target_bits is None or not samples:
            return self
        weights = sum(layer.weight.numel() for layer in samples)

        def bits(threshold: float | None) -> float:
            tried = self.model_copy(update={"outlier_threshold": threshold})
            terms = [term for layer in samples for term in tried.solve(layer).terms]
            return total([term.byte_count() for term in terms]).total * 8 / weights

        if (least := bits(None)) > self.target_bits + TOLERANCE:
            raise RecipeError(
                f"target_bits {self.target_bits:g} cannot be met: without any outlier a weight takes {least:.3f} bits; "
                "raise it, or lower num_bits or enlarge group_size."
            )
        threshold = bisect_falling(bits, self.target_bits, *THRESHOLDS, tolerance=TOLERANCE)
        return self.model_copy(update={"outlier_threshold": threshold, "target_bits": None})

    def solve_group(self, layers: Sequence[Layer]) -> list[Solution]:
        gram, grid = layers[0].statistics.gram, self.grid()
        if gram is None:
            return [Solution([round_to_nearest(layer.weight, grid)]) for layer in layers]
        inverse = inverse_hessian(gram, self.dampening, sort=self.act_order)
        threshold = float("inf") if self.outlier_threshold is None else self.outlier_threshold
        search = ClipSearch(norm=SQUARED) if self.clip == "mse" else None
        solved, notes = gptq_with_outliers([layer.weight for layer in layers], inverse, grid, threshold, search)
        return [Solution(terms, inverse.notes + notes) for terms in solved]

    def solve(self, layer: Layer) -> Solution:
        return self.solve_group([layer])[0]
