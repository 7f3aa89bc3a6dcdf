"""Round to nearest: every weight takes the closest value of a grid fitted to its group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, LutGrid
from rarefy.formats.patterns import Pattern
from rarefy.formats.terms import Quantized, Term, stack
from rarefy.kernels.reference import tables
from rarefy.solvers.clip import ClipSearch, fit

# float16 scales keep 11 bits of precision in [2**-14, 2**15]; stay well inside for groups smaller than the largest.
SMALLEST_STEP, LARGEST_VALUE = 2.0**-12, 2.0**14


def round_to_nearest(
    weight: Tensor,
    grid: Grid,
    importance: Tensor | None = None,
    search: ClipSearch | None = None,
    *,
    gram: Tensor | None = None,
    pattern: Pattern | None = None,
    mask: Tensor | None = None,
) -> Term:
    """Quantize ``weight [out, in]`` or ``[experts, out, in]`` on ``grid``. Raises FormatError when it is not finite.

    ``importance`` (of the weight's shape) and ``gram`` (``[in, in]`` or ``[experts, in, in]``) are those of
    ``clip.fit``; ``mask`` (bool, of the weight's shape) says which weights are kept, in a form that ``pattern`` stores.
    """
    if weight.dim() == 3:
        members = zip(*(_members(part, weight) for part in (weight, importance, gram, mask)), strict=True)
        return stack(
            [
                round_to_nearest(member, grid, own, search, gram=moment, pattern=pattern, mask=kept)
                for member, own, moment, kept in members
            ]
        )
    weight = weight.float() if mask is None else weight.float().masked_fill(~mask, 0.0)
    multiplier = range_multiplier(weight, grid)
    scaled = weight if multiplier is None else weight / multiplier
    params = fit(grid, scaled, importance if mask is None else mask.float(), search, gram)
    codes = grid.encode(scaled, params)
    return Quantized.from_codes(codes, params, grid, multiplier=multiplier, pattern=pattern, mask=mask)


def _members(part: Tensor | None, weight: Tensor) -> Sequence[Any]:
    return [None] * len(weight) if part is None else list(part)


def range_multiplier(weight: Tensor, grid: Grid) -> float | None:
    """A power of two that brings ``weight`` into the range of 16-bit scales, or None when it lies there already."""
    if _float_dtype(grid) != "float16" or weight.numel() == 0:
        return None
    largest = float(weight.abs().max())
    if largest == 0 or not math.isfinite(largest):
        return None
    # A float format divides by its largest value (57344 for E5M2), an even grid by its number of steps.
    steps = float(tables.table(grid.format).max()) if isinstance(grid, FloatGrid) else grid.code_count
    if largest / steps >= SMALLEST_STEP and largest <= LARGEST_VALUE:
        return None
    return 2.0 ** math.floor(math.log2(largest / steps) + 8)  # scales of the widest group are then near 2**-8


def relative_error(weight: Tensor, terms: list[Term]) -> float:
    """``|weight - sum of terms| / |weight|`` in the Frobenius norm; 0 for an all-zero weight."""
    dense = weight.float()
    difference = dense - torch.stack([term.decode() for term in terms]).sum(0)
    norm = float(dense.norm())
    return float(difference.norm()) / norm if norm else 0.0


def _float_dtype(grid: Grid) -> str:
    if isinstance(grid, LutGrid | BinaryGrid):
        return grid.dtype
    return grid.scales.dtype  # type: ignore[attr-defined, no-any-return]
