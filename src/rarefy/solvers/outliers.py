"""Rounding with error feedback that leaves the weights it would hurt most in 16 bits (SpQR, Dettmers et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.formats.grids import Grid
from rarefy.formats.terms import Residual, Term
from rarefy.solvers.clip import ClipSearch
from rarefy.solvers.feedback import Batch, by_batch, compensate
from rarefy.solvers.gptq import RoundColumns, fit_members, quantized
from rarefy.solvers.hessian import InverseHessian

# The largest share of a weight that may be outliers: beyond, the threshold itself is at fault (constant columns).
LIMIT = 0.05


class RoundOrKeep(RoundColumns):
    """``RoundColumns`` for which a weight whose error would cost more than its row's ``threshold [members * rows]`` is
    an outlier and stays as it is; those that would spoil their group's range do not take part in fitting it.

    ``outliers`` bool and ``lost`` float32, both ``[columns, members * rows]``, say which these are and what a code
    lacks.
    """

    def __init__(self, grid: Grid, batch: Batch, threshold: Tensor, search: ClipSearch | None = None):
        super().__init__(grid, batch, search)
        self.threshold = threshold.view(batch.weight.shape[:2])
        self.scales, self._reach = batch.inverse.scales, self.threshold.sqrt()
        self.lost = torch.empty(self.codes.shape, device=self.codes.device)
        self.outliers = torch.empty_like(self.lost, dtype=torch.bool)

    def begin(self, size: int, columns: Tensor, start: int) -> None:
        weight = columns.transpose(1, 2)
        scale = self.scales[:, None, start : start + columns.shape[1]]
        spoils = leave_one_out_gain(weight, scale, self.grid.code_count) > self.threshold[..., None]
        others = (~spoils).sum(-1, keepdim=True).clamp(min=1)
        mean = torch.where(spoils, 0.0, weight).sum(-1, keepdim=True) / others
        filled = torch.where(spoils, mean, weight)
        mass = self.mass[:, start : start + columns.shape[1]]
        self._install(fit_members(self.grid, filled, mass, self.search), start)

    def column(self, values: Tensor, position: int) -> Tensor:
        rounded = super().column(values, position)
        lost, outlier = self.lost[position].view_as(values), self.outliers[position].view_as(values)
        torch.sub(values, rounded, out=lost)
        # (lost / scale)^2 > threshold, without the squares.
        torch.gt(lost.abs(), self._reach * self.scales[:, position : position + 1], out=outlier)
        return torch.where(outlier, values, rounded)


def leave_one_out_gain(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
    """How much the cost of rounding a group falls when one weight is left out, float32 ``[..., size]``.

    ``weight [..., size]`` is rounded to ``levels`` even steps between its smallest and largest value; a weight's cost
    is ``(error / scale) ** 2``. Leaving one out changes the range only if it is the smallest or the largest, so that
    three roundings tell the gain of every weight.
    """
    ordered, order = weight.sort(dim=-1)
    if weight.shape[-1] < 2:
        return torch.zeros_like(weight)
    low, high = ordered[..., :1], ordered[..., -1:]
    base = _cost(weight, scale, low, high, levels)
    total, gain = base.sum(-1, keepdim=True), base.clone()
    for place, narrow in ((0, (ordered[..., 1:2], high)), (-1, (low, ordered[..., -2:-1]))):
        left_out = order[..., place : place % weight.shape[-1] + 1]
        costs = _cost(weight, scale, *narrow, levels).scatter(-1, left_out, 0.0)
        gain.scatter_(-1, left_out, total - costs.sum(-1, keepdim=True))
    return gain


def _cost(weight: Tensor, scale: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    step = ((high - low) / (levels - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
    rounded = ((weight - low) / step).round_().clamp_(0, levels - 1) * step + low
    return ((weight - rounded) / scale).square()


def gptq_with_outliers(
    weights: Sequence[Tensor],
    inverse: InverseHessian,
    grid: Grid,
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
            rule = RoundOrKeep(grid, batch, factor * _column_costs(batch), search)
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


def _residual(rule: RoundOrKeep, batch: Batch, index: int) -> Term:
    """The outliers of a part, columns in stored order."""
    part, multiplier = batch.parts[index], batch.multipliers[index] or 1.0
    order = batch.order_of(index)
    mask = torch.empty_like(rule.outliers[:, part]).index_copy_(0, order, rule.outliers[:, part]).T
    lost = torch.where(rule.outliers[:, part], rule.lost[:, part], 0.0)
    values = torch.empty_like(lost).index_copy_(0, order, lost).T * multiplier
    fits = float(values.abs().max()) <= torch.finfo(torch.float16).max
    return Residual.from_weight(values, mask, "float16" if fits else "bfloat16")
