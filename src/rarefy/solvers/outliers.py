"""Rounding that leaves some weights in 16 bits: those named beforehand, or those it would hurt most.

An outlier takes no part in fitting its group, has no error to feed back, and is stored as what its code lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rarefy.formats.grids import Grid, IntegerGrid, Params
from rarefy.formats.terms import Quantized, Residual, Term, stack
from rarefy.solvers.clip import ClipSearch, fit, fit_group, fit_members, fits_groups
from rarefy.solvers.feedback import Batch, by_batch, compensate
from rarefy.solvers.gptq import RoundColumns, quantized
from rarefy.solvers.hessian import InverseHessian
from rarefy.solvers.rtn import range_multiplier

# The largest share of a weight that may be outliers: beyond, the threshold itself is at fault (constant columns).
LIMIT = 0.05


class RoundOrKeep(RoundColumns):
    """``RoundColumns`` that leaves outliers as they are: those of ``named`` (bool ``[members, rows, columns]``).

    ``outliers`` bool and ``lost`` float32, both ``[columns, members * rows]``, say which these are and what a code
    lacks.
    """

    def __init__(
        self,
        grid: Grid,
        batch: Batch,
        search: ClipSearch | None = None,
        fixed: Params | None = None,
        named: Tensor | None = None,
    ):
        super().__init__(grid, batch, search, fixed)
        self.lost = torch.empty(self.codes.shape, device=self.codes.device)
        self._nothing = self.lost.new_zeros(())
        if named is None:
            self.outliers = torch.empty_like(self.lost, dtype=torch.bool)
        else:
            order = batch.inverse.order[:, None].expand(-1, named.shape[1], -1)
            self.outliers = named.gather(2, order).permute(2, 0, 1).flatten(1).contiguous()

    @cached_property
    def _parts(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Each column of ``lost`` and of ``outliers``."""
        return self.lost.unflatten(1, self._shape).unbind(), self.outliers.unflatten(1, self._shape).unbind()

    def _marks(self, part: slice) -> dict[str, Any]:
        return {"rule": "spare", "marked": self.outliers[part], "lost": self.lost[part]}

    def column(self, values: Tensor, position: int, error: Tensor) -> None:
        lost, outlier = (columns[position] for columns in self._parts)
        super().column(values, position, lost)
        torch.where(outlier, self._nothing, lost, out=error)


class KeepDear(RoundOrKeep):
    """Keeps a weight whose error would cost more than its row's ``threshold [members * rows]``; one that would spoil
    its group's range does not take part in fitting it (SpQR, Dettmers et al. 2023, algorithm 1)."""

    grid: IntegerGrid

    def __init__(self, grid: IntegerGrid, batch: Batch, threshold: Tensor, search: ClipSearch | None = None):
        super().__init__(grid, batch, search)
        self.threshold, self.scales = threshold, batch.inverse.scales
        self._reach = threshold.sqrt()  # (lost / scale)^2 > threshold, without the squares

    def begin(self, size: int, columns: Tensor, start: int) -> None:
        part = slice(start, start + columns.shape[1])
        unit, mass = self.scales[:, part], self.mass[:, part]
        if fits_groups(self.grid, columns.device, columns.shape[1], self.search):
            params, even = fit_group(self.grid, columns, unit, mass, self.threshold, self.search)
            self._install(params, start, even)
            return
        weight = columns.transpose(1, 2)
        gain = leave_one_out_gain(weight, unit[:, None], self.grid.code_count)
        spoils = gain > self.threshold.view(*weight.shape[:2], 1)
        self._install(fit_members(self.grid, mean_filled(weight, spoils), mass, self.search), start)

    def _marks(self, part: slice) -> dict[str, Any]:
        return {**super()._marks(part), "rule": "choose", "reach": self._reach, "unit": self.scales[:, part]}


def mean_filled(values: Tensor, mask: Tensor) -> Tensor:
    """``values [..., size]`` with those of ``mask`` replaced by the mean of the others (0 if there are none)."""
    others = (~mask).sum(-1, keepdim=True).clamp(min=1)
    mean = values.masked_fill(mask, 0.0).sum(-1, keepdim=True) / others
    return torch.where(mask, mean, values)


def leave_one_out_gain(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
    """How much the cost of rounding a group falls when one weight is left out, float32 ``[..., size]``.

    ``weight [..., size]`` is rounded to ``levels`` even steps between its smallest and largest value; a weight's cost
    is ``(error / scale) ** 2``. Leaving one out changes the range only if it is the smallest or the largest, so that
    three roundings tell the gain of every weight.
    """
    size = weight.shape[-1]
    if size < 2:
        return torch.zeros_like(weight)
    ordered, order = weight.sort(dim=-1)
    # The whole range, that without the smallest, and that without the largest.
    low, high = ordered[..., [0, 1, 0]].movedim(-1, 0)[..., None], ordered[..., [-1, -1, -2]].movedim(-1, 0)[..., None]
    step = ((high - low) / (levels - 1)).clamp_(min=torch.finfo(weight.dtype).tiny)
    rounded = ((weight - low) / step).round_().clamp_(0, levels - 1).mul_(step).add_(low)
    gain, *others = ((weight - rounded) / scale).square_()
    ends = order[..., :: size - 1]
    costs = torch.stack(others).scatter_(-1, ends.movedim(-1, 0)[..., None], 0.0).sum(-1)
    return gain.scatter(-1, ends, gain.sum(-1, keepdim=True) - costs.movedim(0, -1))


def gptq_with_outliers(
    weights: Sequence[Tensor],
    inverse: InverseHessian,
    grid: IntegerGrid,
    threshold: float,
    search: ClipSearch | None = None,
) -> tuple[list[list[Term]], list[str]]:
    """Quantize ``weights`` (as for ``gptq``) on ``grid``, with outliers as residuals; terms of each, and notes.

    ``threshold`` counts in the mean over columns of ``variance / U_jj ** 2``, a column's cost of being lost: smaller
    means more outliers, infinite none. Groups are columns that follow each other in the order of ``inverse``.
    """
    notes: list[str] = []

    def solve(batch: Batch) -> list[list[Term]]:
        factor = threshold
        while True:
            rule = KeepDear(grid, batch, factor * _column_costs(batch), search)
            compensate(batch.weight, batch.inverse, rule)
            if float(rule.outliers.float().mean()) <= LIMIT:
                break
            factor *= 2
        if factor != threshold:
            notes.append(f"more than {LIMIT:.0%} of it would be outliers; threshold {factor:g} was used")
        terms = quantized(rule.codes.T, rule.params(), grid, batch, in_place=False)
        if threshold == float("inf"):
            return [[term] for term in terms]
        return [[term, _residual(rule, batch, index)] for index, term in enumerate(terms)]

    return by_batch(weights, inverse, grid, solve), notes


def _column_costs(batch: Batch) -> Tensor:
    """The mean over columns of ``variance / U_jj ** 2`` of the part that a row belongs to, ``[members * rows]``."""
    scales = batch.inverse.in_place(batch.inverse.scales)
    rows = batch.weight.shape[1]
    flat = batch.weight.flatten(0, 1)
    costs = []
    for part in batch.parts:
        own = flat[part]
        cost = (own.var(0, correction=0) / scales[part.start // rows if len(scales) > 1 else 0].square()).mean()
        costs.append(cost.expand(len(own)))
    return torch.cat(costs)


def round_around_outliers(
    weights: Sequence[Tensor],
    outliers: Sequence[Tensor],
    grid: Grid,
    *,
    importance: Sequence[Tensor] | None = None,
    search: ClipSearch | None = None,
    inverse: InverseHessian | None = None,
) -> list[list[Term]]:
    """Quantize ``weights`` (as for ``gptq``) on ``grid``, with ``outliers`` (bool, of their shapes) as residuals.

    ``importance`` (of their shapes): how much each squared error counts in fitting the grid; with ``inverse`` it is by
    default that of the columns. With ``inverse`` there is error feedback between the weights that are no outliers, and
    groups are neighbouring columns whatever its order; without it weights are rounded to nearest.
    Returns terms of each. Raises FormatError when a weight is not finite or a scale cannot be stored.
    """
    any_outlier = any(bool(mask.any()) for mask in outliers)

    def solve(batch: Batch) -> list[list[Term]]:
        mask, *given = batch.beside
        mass = given[0] if given else batch.inverse.in_place(batch.inverse.diagonal)[:, None].expand_as(batch.weight)
        params = _fit_others(batch.weight.flatten(0, 1), mask.flatten(0, 1), mass.flatten(0, 1), grid, search)
        rule = RoundOrKeep(grid, batch, fixed=params, named=mask)
        compensate(batch.weight, batch.inverse, rule)
        terms = quantized(rule.codes.T, rule.params(), grid, batch, in_place=True)
        return [[term, _residual(rule, batch, index)] if any_outlier else [term] for index, term in enumerate(terms)]

    beside = [outliers] if importance is None else [outliers, importance]
    if inverse is not None:
        together = not (inverse.sorted and len(inverse.order) > 1)
        return by_batch(weights, inverse, grid, solve, together=together, beside=beside)
    masses = [torch.ones_like(weight) for weight in weights] if importance is None else importance
    return [
        _rounded(weight, mask, mass, grid, search, any_outlier)
        for weight, mask, mass in zip(weights, outliers, masses, strict=True)
    ]


def _fit_others(weight: Tensor, mask: Tensor, mass: Tensor, grid: Grid, search: ClipSearch | None) -> Params:
    """Parameters for ``weight [rows, columns]`` without the weights of ``mask``."""
    filled = grid.join(mean_filled(grid.split(weight), grid.split(mask)), *weight.shape)
    return fit(grid, filled, mass.masked_fill(mask, 0.0), search)


def _rounded(
    weight: Tensor, mask: Tensor, mass: Tensor, grid: Grid, search: ClipSearch | None, any_outlier: bool
) -> list[Term]:
    if weight.dim() == 3:
        members = zip(weight, mask, mass, strict=True)
        solved = [_rounded(*member, grid, search, any_outlier) for member in members]
        return [stack(list(terms)) for terms in zip(*solved, strict=True)]
    multiplier = range_multiplier(weight, grid)
    scaled = weight if multiplier is None else weight / multiplier
    params = _fit_others(scaled, mask, mass, grid, search)
    term = Quantized.from_codes(grid.encode(scaled, params), params, grid, multiplier=multiplier)
    return [term, residual_of(weight - term.decode(), mask)] if any_outlier else [term]


def residual_of(lacking: Tensor, mask: Tensor) -> Residual:
    """``lacking [rows, columns]`` at the places of ``mask``, in float16 if it fits and in bfloat16 otherwise."""
    fits = float(lacking.masked_fill(~mask, 0.0).abs().max()) <= torch.finfo(torch.float16).max
    return Residual.from_weight(lacking, mask, "float16" if fits else "bfloat16")


def _residual(rule: RoundOrKeep, batch: Batch, index: int) -> Term:
    """The outliers of a part, columns in stored order."""
    part, multiplier = batch.parts[index], batch.multipliers[index] or 1.0
    order = batch.order_of(index)
    mask = torch.empty_like(rule.outliers[:, part]).index_copy_(0, order, rule.outliers[:, part]).T
    lost = torch.empty_like(rule.lost[:, part]).index_copy_(0, order, rule.lost[:, part]).T * multiplier
    return residual_of(lost, mask)
