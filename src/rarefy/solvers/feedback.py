"""Column by column with error feedback: what one column loses, the columns after it make up for.

The loop that GPTQ, SparseGPT and their kin share (Frantar and Alistarh 2022, Optimal Brain Compression; Frantar et
al. 2022, GPTQ, algorithm 1). What happens to a column is a ``ColumnRule``'s to say.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rarefy.formats.grids import Grid
from rarefy.formats.grids.base import check_numbers
from rarefy.formats.terms import Term, stack
from rarefy.kernels.columns import one_by_one
from rarefy.solvers.hessian import InverseHessian
from rarefy.solvers.rtn import range_multiplier

# Columns whose later columns are updated at once, by a matrix product.
BLOCK = 128


class ColumnRule(ABC):
    """Decides what each column becomes. ``segments``: sizes of stretches of columns that it looks at before their first
    is treated, such as groups that share a scale or the m of n:m."""

    segments: tuple[int, ...] = ()

    @abstractmethod
    def begin(self, size: int, columns: Tensor, start: int) -> None:
        """See a segment of ``size`` (the last may be shorter) as it is now: ``columns`` float32 ``[members, columns,
        rows]``, the first of them at position ``start``."""

    @abstractmethod
    def column(self, values: Tensor, position: int, error: Tensor) -> None:
        """Treat ``values`` and write what they lose into ``error``, both ``[members, rows]``."""

    def stretch(self, block: Tensor, errors: Tensor, shares: Tensor, start: int) -> None:
        """Treat as many columns of ``block``, from position ``start`` on, as ``errors`` has, and correct those after
        them: arguments as of ``kernels.columns.round_columns``, here with ``column`` one by one."""
        one_by_one(block, errors, shares, lambda values, index, error: self.column(values, start + index, error))


def compensate(weight: Tensor, inverse: InverseHessian, rule: ColumnRule) -> Tensor:
    """Run ``rule`` over all columns of ``weight [members, rows, columns]`` in the order of ``inverse``.

    Returns what became of them, float32 ``[members, rows, columns]`` in that order. No step waits for the device.
    """
    order = inverse.order[:, :, None].expand(-1, -1, weight.shape[1])
    work = weight.transpose(1, 2).gather(1, order)  # a column's rows lie together
    columns = inverse.columns
    # What later columns take over from an error of 1, so that errors need no scaling in the loop.
    shares = inverse.upper / inverse.scales[..., None]
    members, _, rows = work.shape
    edges = _block_edges(columns, rule.segments)
    for start, end in zip(edges, [*edges[1:], columns], strict=True):
        errors = work.new_empty(members, end - start, rows)
        for first, last in _stretches(start, end, rule.segments):
            for size in rule.segments:
                if first % size == 0:
                    rule.begin(size, work[:, first : min(first + size, columns)], first)
            own = errors[:, first - start : last - start]
            rule.stretch(work[:, first:end], own, shares[:, first:last, first:end], first)
        work[:, start:end] -= errors
        if end < columns:
            work[:, end:].baddbmm_(shares[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
    return work.transpose(1, 2)


def _stretches(start: int, end: int, segments: Sequence[int]) -> list[tuple[int, int]]:
    """Columns from ``start`` to ``end``, cut where a segment begins."""
    cuts = {start}.union(*(range(-(-start // size) * size, end, size) for size in segments))
    return list(pairwise([*sorted(cuts), end]))


def _block_edges(columns: int, segments: Sequence[int]) -> list[int]:
    """Starts of blocks of about ``BLOCK`` columns, such that every segment begins when all its columns are up to date:
    inside one block, or at the start of a block."""
    unit, longest = math.lcm(*segments), max(segments, default=1)
    inner = math.lcm(*(size for size in segments if size != longest))
    if unit <= BLOCK:
        step = outer = BLOCK // unit * unit
    elif longest % inner == 0 and inner <= BLOCK:
        step, outer = BLOCK // inner * inner, longest
    else:
        step = outer = unit
    return [start for first in range(0, columns, outer) for start in range(first, min(first + outer, columns), step)]


@dataclass(frozen=True)
class Batch:
    """Weights that are solved at once: float32 ``[members, rows, columns]`` with one inverse for each member.

    ``parts``: for each weight or expert, its rows among ``members * rows``. ``multipliers``: for each part the power of
    two that it has been divided by, to bring its scales into 16-bit range, or None. ``beside``: tensors of the weight's
    shape that say something of each of its numbers.
    """

    weight: Tensor
    inverse: InverseHessian
    parts: tuple[slice, ...]
    multipliers: tuple[float | None, ...]
    beside: tuple[Tensor, ...] = ()

    @property
    def flat_shape(self) -> tuple[int, int]:
        """``(members * rows, columns)``."""
        return self.weight.shape[0] * self.weight.shape[1], self.weight.shape[2]

    def order_of(self, part: int) -> Tensor:
        """The order in which the columns of a part are treated, int64 ``[columns]``."""
        return self.inverse.order[part if len(self.inverse.order) > 1 else 0]


def by_batch(
    weights: Sequence[Tensor],
    inverse: InverseHessian,
    grid: Grid | None,
    solve: Callable[[Batch], list[list[Term]]],
    *,
    together: bool = True,
    beside: Sequence[Sequence[Tensor]] = (),
) -> list[list[Term]]:
    """Terms of each of ``weights`` that read one input, or of one weight of stacked experts.

    ``solve`` gets as many as can go through the columns ``together`` and returns terms for each of its parts. Weights
    whose rows cannot share parameters of ``grid`` with each other go one at a time. Each of ``beside`` has a tensor for
    each weight, of its shape, and goes with it. Raises FormatError when a weight is not finite.
    """
    experts = weights[0].dim() == 3
    members, *others = [list(own[0]) if experts else list(own) for own in (weights, *beside)]
    for member in members:
        check_numbers(member)
    multipliers = tuple(None if grid is None else range_multiplier(member, grid) for member in members)
    members = [m if factor is None else m / factor for m, factor in zip(members, multipliers, strict=True)]
    rows = [len(member) for member in members]
    height = 1 if grid is None else grid.height(sum(rows))
    if together and all(count % height == 0 for count in rows):
        whole, *wide = [torch.stack(own) if experts else torch.cat(own)[None] for own in (members, *others)]
        ends = [0, *accumulate(rows)]
        solved = solve(Batch(whole, inverse, tuple(map(slice, ends, ends[1:])), multipliers, tuple(wide)))
    else:
        own = [inverse.member(index) if experts else inverse for index in range(len(members))]
        alone = [
            solve(Batch(member[None], inverse, (slice(0, len(member)),), (factor,), tuple(part[None] for part in rest)))
            for member, inverse, factor, *rest in zip(members, own, multipliers, *others, strict=True)
        ]
        solved = [terms for [terms] in alone]
    return [[stack(list(terms)) for terms in zip(*solved, strict=True)]] if experts else solved
