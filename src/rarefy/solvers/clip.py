"""Search for the range that costs least: clipping a few large weights buys finer steps for all others."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from rarefy.core.config import StrictModel
from rarefy.formats.grids import Grid, Params

CHUNK = 1 << 22  # values handled at once, to stay in cache and bound memory


class ClipSearch(StrictModel):
    """``candidates`` factors evenly from 1 down to ``smallest``, judged by ``sum importance * |error| ** norm``.

    (The search of GPTQ's reference quantizer, Frantar et al. 2022, with its exponent 2.4; both ends shrink alike.)
    """

    norm: float = Field(2.4, gt=0)
    candidates: int = Field(20, ge=1)
    smallest: float = Field(0.5, gt=0, le=1)

    def factors(self) -> list[float]:
        return torch.linspace(1.0, self.smallest, self.candidates).tolist()


def fit(grid: Grid, weight: Tensor, importance: Tensor | None = None, search: ClipSearch | None = None) -> Params:
    """Rounded parameters of ``grid`` for ``weight [rows, columns]``, with the best range per block if ``search`` asks.

    Grids that place every value themselves (tables) have no range to shrink and are fitted as they are.
    """
    if search is None or not grid.searchable:
        return grid.fit(weight, importance)
    blocks, importance = grid.prepare(weight, importance)
    height = grid.height(blocks.shape[0])
    step = max(1, CHUNK // max(1, blocks[:1].numel()) // height) * height
    pieces = [
        _search(
            grid, blocks[start : start + step], None if importance is None else importance[start : start + step], search
        )
        for start in range(0, blocks.shape[0], step)
    ]
    return grid.round({name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})


def _search(grid: Grid, blocks: Tensor, importance: Tensor | None, search: ClipSearch) -> Params:
    best: Params | None = None
    lowest = torch.empty(0)
    for factor in search.factors():
        proposed = grid.propose(blocks, importance, factor)
        error = grid.error(blocks, importance, grid.round(proposed), search.norm)
        error = _by_tile(error, (grid.height(blocks.shape[0]), grid.span))
        if best is None:
            best, lowest = proposed, error
            continue
        better = error < lowest
        best = {name: torch.where(better, value, best[name]) for name, value in proposed.items()}
        lowest = torch.where(better, error, lowest)
    assert best is not None
    return best


def _by_tile(error: Tensor, tile: tuple[int, int]) -> Tensor:
    """Errors ``[rows, groups, ...]`` summed over each tile of parameters that are rounded together and so have to
    choose together, at every place of it."""
    for dim, size in enumerate(tile):
        if size > 1:
            index = torch.arange(error.shape[dim], device=error.device) // size
            shape = [*error.shape]
            shape[dim] = int(index[-1]) + 1 if index.numel() else 0
            error = error.new_zeros(shape).index_add_(dim, index, error).index_select(dim, index)
    return error
