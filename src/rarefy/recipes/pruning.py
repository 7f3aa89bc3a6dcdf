"""What a pruning recipe drops and how it keeps the rest, as options that mean the same in every recipe."""

from __future__ import annotations

import math

from pydantic import Field

from rarefy.contracts import WeightRecipe
from rarefy.core.errors import RecipeError
from rarefy.formats.grids import Grid, IntegerGrid
from rarefy.formats.patterns import NM, Bitmap, Pattern

# Above this many subsets of an n:m group a bit per position is the shorter index.
RANKED = 256


class PruningRecipe(WeightRecipe):
    """A recipe that drops weights, alone or together with rounding what stays.

    ``sparsity``: share of zeros. ``n`` and ``m``: keep n of every m neighbouring inputs instead. ``num_bits``: integers
    of so many bits for what stays, in groups of ``group_size`` inputs, instead of 16-bit values.
    """

    sparsity: float = Field(0.5, gt=0, lt=1)
    n: int | None = Field(None, ge=1)
    m: int | None = Field(None, ge=2)
    num_bits: int | None = Field(None, ge=1, le=8)
    group_size: int | None = Field(128, ge=1)

    def model_post_init(self, context: object) -> None:
        if (self.n is None) != (self.m is None):
            raise RecipeError("Options 'n' and 'm' go together; give both or neither.")
        if self.n is not None and self.m is not None:
            if self.n >= self.m:
                raise RecipeError(f"Keeping {self.n} of {self.m} drops nothing; choose n smaller than m.")
            if "sparsity" in self.model_fields_set:
                raise RecipeError("Option 'sparsity' has no effect beside 'n' and 'm'; leave it out.")
        if self.num_bits is None and "group_size" in self.model_fields_set:
            raise RecipeError("Option 'group_size' has no effect without 'num_bits'; leave it out.")

    def pattern(self) -> Pattern:
        """How the positions of what stays are stored."""
        if self.n is None or self.m is None:
            return Bitmap()
        ranked = self.m <= 62 and math.comb(self.m, self.n) <= RANKED
        return NM(n=self.n, m=self.m, index="rank" if ranked else "bitmap")

    def grid(self) -> Grid | None:
        """The grid of what stays; None for 16-bit values."""
        if self.num_bits is None:
            return None
        return IntegerGrid(num_bits=self.num_bits, group_size=self.group_size, zero="integer")
