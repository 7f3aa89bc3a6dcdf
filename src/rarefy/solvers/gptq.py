"""Rounding to a grid with error feedback (GPTQ, Frantar et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from rarefy.core.logs import logger
from rarefy.formats.grids import Grid, Params
from rarefy.formats.grids.base import Rounding
from rarefy.formats.inputs import PermutedInput
from rarefy.formats.terms import Quantized, Term
from rarefy.kernels.columns import Rule
from rarefy.kernels.native import round_columns
from rarefy.solvers.clip import ClipSearch, fit_members
from rarefy.solvers.feedback import Batch, ColumnRule, by_batch, compensate
from rarefy.solvers.hessian import InverseHessian

log = logger(__name__)


class RoundColumns(ColumnRule):
    """Rounds each column to ``grid``, whose parameters are fitted to each group when its turn comes, or are ``fixed``
    for all groups beforehand. ``codes`` and ``params`` are those of the flattened batch, columns in processing order.

    Grids of even steps have a kernel for a whole stretch of columns; those of tables are rounded one by one, in torch.
    """

    def __init__(self, grid: Grid, batch: Batch, search: ClipSearch | None = None, fixed: Params | None = None):
        rows, columns = batch.flat_shape
        self.grid, self.search, self.mass = grid, search, batch.inverse.diagonal
        self.codes = torch.empty(columns, rows, dtype=torch.uint8, device=batch.weight.device)
        self._size = grid.size(columns)
        self._fitted: list[Params] = []
        self._shape = batch.weight.shape[:2]
        self._group_of = [position // self._size for position in range(columns)]
        self._first = 0  # the group that the parameters at hand begin with
        self._even: tuple[Tensor, Tensor] | None = None
        if fixed is None:
            self.segments = (self._size * grid.span,)
        else:
            self._install(fixed, 0)
            self._group_of = (batch.inverse.order[0] // self._size).tolist()

    def begin(self, size: int, columns: Tensor, start: int) -> None:
        mass = self.mass[:, start : start + columns.shape[1]]
        self._install(fit_members(self.grid, columns.transpose(1, 2), mass, self.search), start)

    def stretch(self, block: Tensor, errors: Tensor, shares: Tensor, start: int) -> None:
        part = slice(start, start + errors.shape[1])
        if not self.round(block, errors, shares, part, **self._marks(part)):
            super().stretch(block, errors, shares, start)

    def round(
        self, block: Tensor, errors: Tensor, shares: Tensor, part: slice, rule: Rule = "every", **marks: Any
    ) -> bool:
        """``round_columns`` for the positions ``part``; False when the grid has no even steps."""
        if self._even is None:
            return False
        groups = [group - self._first for group in self._group_of[part]]
        scale, zero = self._even
        round_columns(
            block, errors, shares, codes=self.codes[part], scale=scale, zero=zero, groups=groups,
            last=self.grid.code_count - 1, rule=rule, **marks,
        )  # fmt: skip
        return True

    def _marks(self, part: slice) -> dict[str, Any]:
        """What ``round_columns`` has to know of the positions ``part`` beyond the grid."""
        return {}

    @cached_property
    def _columns(self) -> tuple[Tensor, ...]:
        return self.codes.unflatten(1, self._shape).unbind()

    def column(self, values: Tensor, position: int, error: Tensor) -> None:
        codes, rounded = self._rounding(values.flatten(), self._group_of[position] - self._first)
        self._columns[position].copy_(codes.view(values.shape))
        torch.sub(values, rounded.view(values.shape), out=error)

    def params(self) -> Params:
        """Rounded parameters of all groups."""
        return {name: torch.cat([part[name] for part in self._fitted], dim=1) for name in self._fitted[0]}

    def _install(self, params: Params, start: int, even: tuple[Tensor, Tensor] | None = None) -> None:
        self._fitted.append(params)
        self._even = self.grid.even(params) if even is None else even
        if self._even is None:
            _tell(self.grid.type, self.codes.device.type)
            self._rounding: Rounding = self.grid.rounding(params)
        self._first = start // self._size


@lru_cache
def _tell(grid: str, device: str) -> None:
    """Say once that a grid has no kernel."""
    log.info("Columns on a grid of type '%s' are rounded one by one in torch on %s.", grid, device)


def gptq(
    weights: Sequence[Tensor],
    inverse: InverseHessian,
    grid: Grid,
    *,
    search: ClipSearch | None = None,
    static_groups: bool = False,
) -> list[list[Term]]:
    """Quantize ``weights`` (float32 ``[out, in]``, all of one input; or one ``[experts, out, in]``) on ``grid``.

    With ``static_groups`` a group is neighbouring columns whatever the order of ``inverse``, and its parameters are
    fitted before the first column is rounded; otherwise a group is columns that follow each other in that order,
    fitted when its turn comes, and an order other than the stored one costs a stored permutation.
    Raises FormatError when a weight is not finite or a scale cannot be stored.
    """

    def solve(batch: Batch) -> list[list[Term]]:
        fixed = None
        if static_groups:
            fixed = fit_members(grid, batch.weight, batch.inverse.in_place(batch.inverse.diagonal), search)
        rule = RoundColumns(grid, batch, search, fixed)
        compensate(batch.weight, batch.inverse, rule)
        return [[term] for term in quantized(rule.codes.T, rule.params(), grid, batch, static_groups)]

    # Experts differ in their order, and columns of different groups cannot be rounded in one step.
    together = not (static_groups and inverse.sorted and len(inverse.order) > 1)
    return by_batch(weights, inverse, grid, solve, together=together)


def quantized(codes: Tensor, params: Params, grid: Grid, batch: Batch, in_place: bool) -> list[Term]:
    """Terms of a batch's parts from ``codes [members * rows, columns]`` in processing order.

    ``in_place``: the parameters are those of neighbouring columns, so that codes go back to where they came from;
    otherwise they stay in the order in which they were found, and the term stores it.
    """
    rows, terms = len(codes), list[Term]()
    for index, (part, multiplier) in enumerate(zip(batch.parts, batch.multipliers, strict=True)):
        order, placed = batch.order_of(index), codes[part]
        own = {  # one entry may serve several rows
            name: tensor[part.start * len(tensor) // rows : -(-part.stop * len(tensor) // rows)]
            for name, tensor in params.items()
        }
        input, tensors = None, None
        if batch.inverse.sorted and in_place:
            placed = codes.T[:, part].index_select(0, order.argsort()).T  # whole columns are moved, row by row
        elif batch.inverse.sorted:
            input, tensors = PermutedInput(), {"permutation": order.to(torch.int32)}
        terms.append(
            Quantized.from_codes(placed, own, grid, multiplier=multiplier, input=input, input_tensors=tensors)
        )
    return terms
