"""Pruning by a mask: what stays keeps its value, or is rounded to the nearest of a grid."""

from __future__ import annotations

from torch import Tensor

from rarefy.formats.grids import Grid
from rarefy.formats.patterns import NM, Pattern
from rarefy.formats.terms import Sparse, Term, stack
from rarefy.solvers.masks import keep_n_of_m, keep_share
from rarefy.solvers.rtn import round_to_nearest


def prune(weight: Tensor, scores: Tensor, pattern: Pattern, sparsity: float, grid: Grid | None = None) -> Term:
    """The largest ``scores`` of each row of ``weight [out, in]`` or ``[experts, out, in]``: all but the share
    ``sparsity``, or those of each n:m group that ``pattern`` keeps. 16-bit values, or codes of ``grid``."""
    n_m = isinstance(pattern, NM)
    mask = keep_n_of_m(scores, pattern.n, pattern.m) if n_m else keep_share(scores, sparsity)  # type: ignore[attr-defined]
    if grid is not None:
        return round_to_nearest(weight, grid, pattern=pattern, mask=mask)
    if weight.dim() == 3:
        return stack([Sparse.from_weight(own, kept, pattern) for own, kept in zip(weight, mask, strict=True)])
    return Sparse.from_weight(weight, mask, pattern)
