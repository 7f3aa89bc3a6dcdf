"""The grid that a recipe rounds to, as options that mean the same in every recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationError

from rarefy.contracts import WeightRecipe
from rarefy.core.errors import RecipeError
from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LevelGrid, LutGrid
from rarefy.formats.layout import FloatName
from rarefy.formats.scales import AnyScale, BilevelScale, SingleScale
from rarefy.solvers.clip import ClipSearch

FloatFormat = Literal["fp3", "fp4", "nf3", "nf4", "fp6_e2m3", "fp8_e4m3", "fp8_e5m2"]
# Which options mean something for a format, besides ``scales``; one that means nothing is refused, not ignored.
FLOAT_OPTIONS = {"group_size", "two_scales", "clip"}
OPTIONS_OF = {
    "int": {"num_bits", "group_size", "symmetric", "zero_point", "clip"},
    "lut": {"num_bits", "rows_per_lut"},
    "ternary": {"group_size"},
    "five_level": {"group_size", "symmetric", "zero_point", "clip"},
    "binary": {"group_size", "regions"},
}


class GridRecipe(WeightRecipe):
    """A recipe that rounds to one grid.

    ``format``: ``int`` (``num_bits``, ``symmetric``, and ``zero_point`` integer or float when not symmetric), a float
    format, ``lut`` (k-means, ``rows_per_lut`` rows share a table), ``ternary``, ``five_level`` or ``binary`` with
    ``regions``.
    ``group_size`` null means one group per row. ``two_scales`` (float formats) scales each sign on its own.
    ``scales``: a dtype, or ``bilevel`` for two-level 4-bit scales over 16 rows. ``clip``: ``none`` or ``mse``.
    """

    recipe_version: ClassVar[int] = 2  # two-level scales take 4 bits

    format: Literal["int", "lut", "ternary", "five_level", "binary", FloatFormat] = "int"
    num_bits: int = Field(4, ge=1, le=8)
    group_size: int | None = Field(128, ge=1)
    symmetric: bool = False
    zero_point: Literal["integer", "float"] = "integer"
    two_scales: bool = False
    rows_per_lut: int | None = Field(1, ge=1)
    regions: int = Field(1, ge=1, le=4)
    scales: Literal[FloatName, "bilevel"] = "float16"
    clip: Literal["none", "mse"] = "none"

    def model_post_init(self, context: object) -> None:
        given = self.model_fields_set & GridRecipe.model_fields.keys()
        useless = given - {"format", "scales"} - OPTIONS_OF.get(self.format, FLOAT_OPTIONS)
        if self.scales == "bilevel" and self.format in ("lut", "binary"):
            useless.add("scales")
        if useless:
            raise RecipeError(f"Option '{min(useless)}' has no effect on format '{self.format}'; leave it out.")
        if self.symmetric and "zero_point" in self.model_fields_set:
            raise RecipeError("A symmetric grid has no zero point; set one of 'symmetric' and 'zero_point'.")
        try:
            self.grid()
        except ValidationError as failure:
            reason = failure.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise RecipeError(f"These options cannot be combined: {reason}.") from None

    def grid(self) -> Grid:
        """The grid that the options describe."""
        two_level = BilevelScale(scale_bits=4, zero_bits=4)
        scales: AnyScale = two_level if self.scales == "bilevel" else SingleScale(dtype=self.scales)
        zero: Literal["none", "integer", "float"] = "none" if self.symmetric else self.zero_point
        table_dtype: FloatName = "float16" if self.scales == "bilevel" else self.scales
        match self.format:
            case "int":
                return IntegerGrid(num_bits=self.num_bits, group_size=self.group_size, zero=zero, scales=scales)
            case "ternary":
                return LevelGrid(levels=3, group_size=self.group_size, scales=scales)
            case "five_level":
                return LevelGrid(levels=5, group_size=self.group_size, zero=zero, scales=scales)
            case "lut":
                return LutGrid(num_bits=self.num_bits, rows_per_lut=self.rows_per_lut, dtype=table_dtype)
            case "binary":
                return BinaryGrid(regions=self.regions, group_size=self.group_size, dtype=table_dtype)
            case name:
                return FloatGrid(format=name, group_size=self.group_size, two_scales=self.two_scales, scales=scales)

    def search(self) -> ClipSearch | None:
        """The search for the range of each group that ``clip`` asks for."""
        return ClipSearch() if self.clip == "mse" else None
