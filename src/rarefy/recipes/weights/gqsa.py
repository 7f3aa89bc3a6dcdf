"""GQSA (Zeng et al. 2024): groups of a row's neighbouring inputs are dropped whole, the others are small integers.

A group that is kept is a group that shares a scale, so that position, scale and codes lie together and a kernel skips
what is not there. Groups go by what losing them costs, ``w_G inverse([H^-1]_GG) w_G^T``, in a few rounds; after each
all weights that stay make up for the loss by least squares. Then these are rounded with error feedback, and the scales
fitted to their codes. This is the one-shot half of the method: its two stages of training are not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from rarefy.contracts import Layer, Schedule, Solution, WeightRecipe, weight_recipes
from rarefy.core.errors import RecipeError
from rarefy.formats.grids import IntegerGrid
from rarefy.formats.patterns import Groups
from rarefy.formats.scales import BilevelScale, SingleScale
from rarefy.saliency import group_mean, group_obs, outputs
from rarefy.solvers.clip import ClipSearch
from rarefy.solvers.groups import prune_groups
from rarefy.solvers.hessian import inverse_hessian
from rarefy.statistics import Gram

SCORES = {"group_obs": group_obs, "mean": group_mean}


@weight_recipes.register("gqsa")
class Gqsa(WeightRecipe):
    """Group sparsity and integers, without training.

    ``sparsity``: share of groups of ``group_size`` inputs that are dropped: of each row (``rows: balanced``), or of a
    layer, an error in an output counting by what the loss loses (``fisher``) or all alike (``equal``). ``num_bits``
    null keeps the others in 16 bits. ``scales``: 16-bit scales with integer zeros, or ``bilevel``: 4 bits for the scale
    and 4 for the zero of a group, shared out over ``scale_rows`` rows. ``index``: a ``bitmap`` of groups, or their
    numbers (``ids`` for balanced rows, ``csr`` for any). ``saliency``: the cost of a whole group, or the ``mean`` of
    its weights' own. ``rounds``: of pruning. ``clip``: ``mse`` searches each group's range. ``refit``: fit the scales
    to the codes. ``dampening``: share of the Hessian's mean diagonal added to it. ``true_sequential``: layers see the
    compressed ones before them in their block.
    """

    recipe_version: ClassVar[int] = 2  # a searched range comes with searched codes of its scale

    sparsity: float = Field(0.5, gt=0, lt=1)
    num_bits: int | None = Field(4, ge=2, le=8)
    group_size: int = Field(16, ge=2)
    rows: Literal["balanced", "fisher", "equal"] = "balanced"
    index: Literal["bitmap", "ids", "csr"] = "bitmap"
    scales: Literal["float16", "bfloat16", "bilevel"] = "bilevel"
    scale_rows: int = Field(64, ge=1)
    saliency: Literal["group_obs", "mean"] = "group_obs"
    rounds: int = Field(4, ge=1, le=64)
    clip: Literal["none", "mse"] = "none"
    refit: bool = True
    dampening: float = Field(0.01, gt=0)
    true_sequential: bool = False

    def model_post_init(self, context: object) -> None:
        if self.index == "ids" and self.rows != "balanced":
            raise RecipeError("Index 'ids' stores equally many groups of every row; use 'csr' or rows 'balanced'.")
        if self.num_bits is None and (useless := self.model_fields_set & {"scales", "scale_rows", "clip", "refit"}):
            raise RecipeError(f"Option '{min(useless)}' has no effect on 16-bit values; leave it out or set num_bits.")
        if self.scales != "bilevel" and "scale_rows" in self.model_fields_set:
            raise RecipeError("Option 'scale_rows' has no effect without two-level scales; set scales to 'bilevel'.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "fisher"} if self.rows == "fisher" else {"gram"})

    def schedule(self) -> Schedule:
        return Schedule(true_sequential=self.true_sequential)

    def grid(self) -> IntegerGrid | None:
        """The grid of what stays; None for 16-bit values."""
        if self.num_bits is None:
            return None
        if self.scales != "bilevel":
            scales = SingleScale(dtype=self.scales)
            return IntegerGrid(num_bits=self.num_bits, group_size=self.group_size, zero="integer", scales=scales)
        levels = BilevelScale(scale_bits=4, zero_bits=4, rows=self.scale_rows)
        return IntegerGrid(num_bits=self.num_bits, group_size=self.group_size, zero="float", scales=levels)

    def solve_group(self, layers: Sequence[Layer]) -> list[Solution]:
        weights, gram = [layer.weight for layer in layers], layers[0].statistics.gram
        if gram is None:
            gram = Gram(weights[0].shape[-1], len(weights[0]) if weights[0].dim() == 3 else None, weights[0].device)
        inverse = inverse_hessian(gram, self.dampening, sort=True)
        solved = prune_groups(
            weights, inverse, SCORES[self.saliency], Groups(size=self.group_size, index=self.index), self.sparsity,
            rows=None if self.rows == "balanced" else [self._counts(layer, gram) for layer in layers],
            grid=self.grid(), search=ClipSearch() if self.clip == "mse" else None,
            rounds=self.rounds, refit=self.refit,
        )  # fmt: skip
        notes = [*inverse.notes]
        if self.rows == "fisher" and any(layer.statistics.fisher is None for layer in layers):
            notes.append("its fisher is not known; all its rows count alike")
        return [Solution(terms, notes) for terms in solved]

    def solve(self, layer: Layer) -> Solution:
        return self.solve_group([layer])[0]

    def _counts(self, layer: Layer, gram: Gram) -> Tensor:
        """How much an error in each output counts."""
        if self.rows == "equal" or layer.statistics.fisher is None:
            return layer.weight.new_ones(layer.weight.shape[:-1])
        return outputs(layer.statistics.fisher.mean(), gram.mean().diagonal(dim1=-2, dim2=-1))
