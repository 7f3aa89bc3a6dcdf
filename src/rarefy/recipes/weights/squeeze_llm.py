"""SqueezeLLM (Kim et al. 2023): a table of values per row, placed where the loss is sensitive, and a few outliers.

Near a minimum of the loss its second-order expansion is ``sum F_ij (w_ij - q_ij)^2`` with the Fisher information's
diagonal ``F``, the mean squared gradient of single sequences (equations 3 to 5). Each row's ``2 ** num_bits`` values
minimise it: a weighted k-means in one dimension. Before, the weights with the largest ``F`` and the largest ``|w|`` are
taken out, so that no value is spent on them, and stored in 16 bits (section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from rarefy.contracts import Layer, Solution, WeightRecipe, weight_recipes
from rarefy.formats.grids import LutGrid
from rarefy.formats.layout import FloatName
from rarefy.saliency import magnitude
from rarefy.solvers.hessian import inverse_hessian
from rarefy.solvers.masks import largest_of_each
from rarefy.solvers.outliers import round_around_outliers


@weight_recipes.register("squeeze_llm")
class SqueezeLlm(WeightRecipe):
    """Sensitivity-weighted tables and outliers.

    ``rows_per_lut``: rows that share a table (null: all), for layers too narrow to pay for one each. ``table_dtype``:
    of its values. ``sensitive_share`` and ``magnitude_share``: of a layer's weights that stay in 16 bits for their
    Fisher information and their size. ``importance``: what a weight's squared error counts, its ``fisher`` information
    or ``equal``. ``feedback``: round column by column with the error feedback of gptq, on the same tables;
    ``dampening`` is then the share of the Hessian's mean diagonal added to it.
    """

    num_bits: int = Field(3, ge=1, le=8)
    rows_per_lut: int | None = Field(1, ge=1)
    table_dtype: FloatName = "float16"
    sensitive_share: float = Field(0.0005, ge=0, le=0.1)
    magnitude_share: float = Field(0.004, ge=0, le=0.1)
    importance: Literal["fisher", "equal"] = "fisher"
    feedback: bool = False
    dampening: float = Field(0.01, gt=0)

    @property
    def needs(self) -> frozenset[str]:
        fisher = self.importance == "fisher" or self.sensitive_share > 0
        return frozenset({"fisher"} if fisher else ()) | frozenset({"gram"} if self.feedback else ())

    def grid(self) -> LutGrid:
        return LutGrid(num_bits=self.num_bits, rows_per_lut=self.rows_per_lut, dtype=self.table_dtype)

    def solve_group(self, layers: Sequence[Layer]) -> list[Solution]:
        weights, gram = [layer.weight for layer in layers], layers[0].statistics.gram
        sizes = [magnitude(weight) for weight in weights]
        fishers = [layer.statistics.fisher for layer in layers]
        known = [size if fisher is None else fisher.mean() for size, fisher in zip(sizes, fishers, strict=True)]
        outliers = [
            largest_of_each([(fisher, self.sensitive_share), (size, self.magnitude_share)], ties=size)
            for size, fisher in zip(sizes, known, strict=True)
        ]
        weighted = self.importance == "fisher" and None not in fishers
        importance = known if weighted else [size.new_ones(size.shape) for size in sizes]
        inverse = inverse_hessian(gram, self.dampening, sort=True) if self.feedback and gram is not None else None
        solved = round_around_outliers(weights, outliers, self.grid(), importance=importance, inverse=inverse)
        notes = [] if inverse is None else [*inverse.notes]
        if None in fishers and "fisher" in self.needs:
            notes.append("its fisher is not known; errors count alike, and its largest weights are the outliers")
        return [Solution(terms, notes) for terms in solved]

    def solve(self, layer: Layer) -> Solution:
        return self.solve_group([layer])[0]
