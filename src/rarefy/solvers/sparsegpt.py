"""Pruning with error feedback, alone or together with rounding (SparseGPT, Frantar and Alistarh 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rarefy.formats.grids import Grid
from rarefy.formats.patterns import NM, Pattern
from rarefy.formats.terms import Quantized, Sparse, Term
from rarefy.kernels.native import round_columns
from rarefy.solvers.clip import ClipSearch
from rarefy.solvers.feedback import BLOCK, Batch, ColumnRule, by_batch, compensate
from rarefy.solvers.gptq import RoundColumns
from rarefy.solvers.hessian import InverseHessian
from rarefy.solvers.masks import keep_n_of_m, keep_share

# Weights and the diagonal of U, each ``[members, rows, columns]``, -> scores of the same shape.
Score = Callable[[Tensor, Tensor], Tensor]


class PruneColumns(ColumnRule):
    """Drops the lowest ``score`` of each n:m group, or of all rows of a stretch of columns, as its turn comes; what
    stays is rounded by ``rounding`` if there is one. ``kept`` is bool ``[columns, members, rows]``."""

    def __init__(
        self, batch: Batch, score: Score, sparsity: float, pattern: Pattern, rounding: RoundColumns | None = None
    ):
        self.score, self.sparsity, self.pattern, self.rounding = score, sparsity, pattern, rounding
        self.scales = batch.inverse.scales
        members, rows, columns = batch.weight.shape
        self.kept = torch.empty(columns, members, rows, dtype=torch.bool, device=batch.weight.device)
        self._nothing = batch.weight.new_zeros(())
        inner = () if rounding is None else rounding.segments
        # A stretch holds whole groups, so that a group is fitted to what stays of it.
        stretch = max(1, BLOCK // max(inner, default=1)) * max(inner, default=1)
        self._size = pattern.m if isinstance(pattern, NM) else stretch
        self.segments = tuple(dict.fromkeys((self._size, *inner)))

    def begin(self, size: int, columns: Tensor, start: int) -> None:
        part = slice(start, start + columns.shape[1])
        if size == self._size:
            self.kept[part] = self._choose(columns, part).transpose(0, 1)
        if self.rounding is not None and size in self.rounding.segments:
            # Groups of n:m inside it are chosen later; what would stay now is the best guess.
            kept = self.kept[part].transpose(0, 1) if size <= self._size else self._choose(columns, part)
            self.rounding.begin(size, torch.where(kept, columns, 0.0), start)

    def stretch(self, block: Tensor, errors: Tensor, shares: Tensor, start: int) -> None:
        part = slice(start, start + errors.shape[1])
        kept = self.kept[part].flatten(1)
        if self.rounding is None:
            round_columns(block, errors, shares, rule="drop", marked=kept)
        elif not self.rounding.round(block, errors, shares, part, "drop", marked=kept):
            super().stretch(block, errors, shares, start)

    def column(self, values: Tensor, position: int, error: Tensor) -> None:
        if self.rounding is not None:
            self.rounding.column(values, position, error)
        lost = self._nothing if self.rounding is None else error
        torch.where(self.kept[position], lost, values, out=error)

    def _choose(self, columns: Tensor, part: slice) -> Tensor:
        """Mask of ``columns [members, size, rows]`` at the positions ``part``, of that shape."""
        weight = columns.transpose(1, 2)
        scores = self.score(weight, self.scales[:, None, part].expand_as(weight))
        if isinstance(self.pattern, NM):
            return keep_n_of_m(scores, self.pattern.n, self.pattern.m).transpose(1, 2)
        return keep_share(scores.flatten(1), self.sparsity).view_as(scores).transpose(1, 2)


def prune_with_feedback(
    weights: Sequence[Tensor],
    inverse: InverseHessian,
    score: Score,
    *,
    pattern: Pattern,
    sparsity: float = 0.5,
    grid: Grid | None = None,
    search: ClipSearch | None = None,
) -> list[list[Term]]:
    """Prune ``weights`` (float32 ``[out, in]``, or one ``[experts, out, in]``), each to ``sparsity`` or by the n:m
    ``pattern``, and quantize what stays on ``grid`` if one is given; otherwise it stays in 16 bits.

    ``inverse`` must have its columns in stored order. Raises FormatError when a number cannot be stored.
    """

    def solve(batch: Batch) -> list[list[Term]]:
        rounding = None if grid is None else RoundColumns(grid, batch, search)
        rule = PruneColumns(batch, score, sparsity, pattern, rounding)
        values = compensate(batch.weight, batch.inverse, rule)[0]
        kept = rule.kept[:, 0].T
        if grid is None or rounding is None:
            return [[Sparse.from_weight(values, kept, pattern)]]
        (multiplier,) = batch.multipliers
        codes, params = rounding.codes.T, rounding.params()
        return [[Quantized.from_codes(codes, params, grid, pattern=pattern, mask=kept, multiplier=multiplier)]]

    # Each weight alone has the wanted sparsity, not only all of them together.
    return by_batch(weights, inverse, grid, solve, together=False)
