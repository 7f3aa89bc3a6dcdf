"""Pruning of whole groups of neighbouring inputs, with all weights that stay making up for those that go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rarefy.formats.grids import Grid, IntegerGrid, Params
from rarefy.formats.patterns import Groups
from rarefy.formats.terms import Quantized, Sparse, Term, stack
from rarefy.solvers.clip import ClipSearch, fit_members
from rarefy.solvers.feedback import Batch, by_batch, compensate
from rarefy.solvers.gptq import RoundColumns
from rarefy.solvers.hessian import InverseHessian
from rarefy.solvers.least_squares import fit_kept, fit_scales
from rarefy.solvers.masks import keep_share

# Groups of a weight [rows, groups, size] and the block of the inverse Hessian of each, [groups, size, size], -> scores
# [rows, groups].
GroupScore = Callable[[Tensor, Tensor], Tensor]
# Steps of least squares after each round of pruning, and further ones after the last.
STEPS, LAST_STEPS = 6, 6


class RoundKept(RoundColumns):
    """``RoundColumns`` with fixed parameters that drops what is not in a ``mask [rows, columns]`` of a single weight;
    what later columns made of it is passed on like any other error."""

    def __init__(self, grid: Grid, batch: Batch, params: Params, mask: Tensor):
        super().__init__(grid, batch, fixed=params)
        self._kept = mask.T[batch.inverse.order[0]].contiguous()

    def _marks(self, part: slice) -> dict[str, Any]:
        return {"rule": "drop", "marked": self._kept[part]}

    def column(self, values: Tensor, position: int, error: Tensor) -> None:
        super().column(values, position, error)
        torch.where(self._kept[position], error, values, out=error)


def prune_groups(
    weights: Sequence[Tensor],
    inverse: InverseHessian,
    score: GroupScore,
    pattern: Groups,
    sparsity: float,
    *,
    rows: Sequence[Tensor] | None = None,
    grid: IntegerGrid | None = None,
    search: ClipSearch | None = None,
    rounds: int = 4,
    refit: bool = True,
) -> list[list[Term]]:
    """Prune groups of ``pattern`` from ``weights`` (float32 ``[out, in]`` of one input, or one ``[experts, out, in]``).

    Each row loses the share ``sparsity`` of its groups, those with the lowest ``score``; or each weight, where ``rows``
    (``[out]`` or ``[experts, out]``) says how much an error in each output counts. Of ``rounds`` each drops an equal
    number and lets all weights that stay make up for it, by least squares in the output. These are 16-bit values, or
    are rounded to ``grid`` with error feedback, and with ``refit`` the scales are then fitted to the codes.
    Raises FormatError when a number cannot be stored.
    """
    experts = weights[0].dim() == 3
    solved: list[list[Term]] = []
    for index, weight in enumerate(weights[0] if experts else weights):
        own = inverse.member(index) if experts else inverse
        blocks, (hessian,) = diagonal_blocks(own, pattern.size), own.hessian()
        counts = None if rows is None else rows[0][index] if experts else rows[index]
        values, mask = choose_groups(weight, hessian, blocks, score, pattern.size, sparsity, rounds, counts)
        if grid is None:
            solved.append([Sparse.from_weight(values, mask, pattern)])
        else:
            finish = partial(_rounded, hessian=hessian, grid=grid, pattern=pattern, search=search, refit=refit)
            solved += by_batch([values], own, grid, finish, beside=[[weight], [mask]])
    return [[stack(list(terms)) for terms in zip(*solved, strict=True)]] if experts else solved


def choose_groups(
    weight: Tensor,
    hessian: Tensor,
    blocks: Tensor,
    score: GroupScore,
    size: int,
    sparsity: float,
    rounds: int,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What becomes of ``weight [rows, columns]`` when groups are pruned as in ``prune_groups``, and the mask of it.
    ``counts [rows]`` is how much an error in each row counts, None where all rows lose the same share."""
    rows, columns = weight.shape
    values, mask = weight, torch.ones_like(weight, dtype=torch.bool)
    kept = torch.ones(rows, len(blocks), dtype=torch.bool, device=weight.device)
    for number in range(1, rounds + 1):
        grouped = torch.nn.functional.pad(values, (0, -columns % size)).unflatten(1, (-1, size))
        scores = score(grouped, blocks)
        share = sparsity * number / rounds
        if counts is None:
            kept = keep_share(scores.masked_fill(~kept, -1.0), share)
        else:
            kept = keep_share((scores * counts[:, None]).masked_fill(~kept, -1.0).flatten(), share).view_as(scores)
        mask = kept.repeat_interleave(size, 1)[:, :columns]
        values = fit_kept(weight, hessian, mask, values, STEPS + LAST_STEPS * (number == rounds))
    return values, mask


def diagonal_blocks(inverse: InverseHessian, size: int) -> Tensor:
    """Blocks ``[groups, size, size]`` of the inverse Hessian on its diagonal, columns in stored order, of its first
    member; a short last one is completed by the identity."""
    place = inverse.order[0].argsort()
    columns = inverse.columns
    blocks = torch.eye(size, device=place.device).repeat(-(-columns // size), 1, 1)
    for group, start in enumerate(range(0, columns, size)):
        own = inverse.upper[0][:, place[start : start + size]]
        blocks[group, : own.shape[1], : own.shape[1]] = own.T @ own
    return blocks


def _rounded(
    batch: Batch, *, hessian: Tensor, grid: IntegerGrid, pattern: Groups, search: ClipSearch | None, refit: bool
) -> list[list[Term]]:
    """The values of a batch of one weight, with what they were found for and their mask beside them, as codes."""
    ((values,), ((weight,), (mask,)), (multiplier,)) = batch.weight, batch.beside, batch.multipliers
    weight = weight if multiplier is None else weight / multiplier
    mass = batch.inverse.in_place(batch.inverse.diagonal)
    # Groups that are dropped have a say only where groups of several rows are stored together: as they were.
    params = fit_members(grid, torch.where(mask, values, weight)[None], mass, search)
    rule = RoundKept(grid, batch, params, mask)
    compensate(batch.weight, batch.inverse, rule)
    codes = torch.empty_like(rule.codes.T).index_copy_(1, batch.order_of(0), rule.codes.T)
    if refit:
        params = _refitted(codes, params, mask, weight, hessian, grid)
    return [[Quantized.from_codes(codes, params, grid, pattern=pattern, mask=mask, multiplier=multiplier)]]


def _refitted(
    codes: Tensor, params: Params, mask: Tensor, weight: Tensor, hessian: Tensor, grid: IntegerGrid
) -> Params:
    """``params`` with the scales of least output error for these codes; as they were if rounding them loses more than
    fitting gains."""
    numbers = {name: number.squeeze(-1) for name, number in grid.load(params).items()}
    steps = (grid.split(codes) - numbers["zero"].unsqueeze(-1)).float()
    parts = grid.join(steps, *codes.shape).masked_fill(~mask, 0.0)
    found = fit_scales(weight, hessian, parts, grid.size(codes.shape[1]))
    scale = torch.where(found > 0, found, numbers["scale"])
    proposed = {"scale": scale} if grid.zero == "none" else {"scale": scale, "zero_point": numbers["zero"]}
    refitted = grid.round(proposed)
    better = _lost(codes, refitted, mask, weight, hessian, grid) < _lost(codes, params, mask, weight, hessian, grid)
    return refitted if bool(better) else params


def _lost(codes: Tensor, params: Params, mask: Tensor, weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """The squared output error."""
    difference = grid.decode(codes, params).masked_fill(~mask, 0.0) - weight
    return ((difference @ hessian) * difference).sum(dtype=torch.float64)
