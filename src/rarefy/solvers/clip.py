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


def fit(
    grid: Grid,
    weight: Tensor,
    importance: Tensor | None = None,
    search: ClipSearch | None = None,
    gram: Tensor | None = None,
) -> Params:
    """Rounded parameters of ``grid`` for ``weight [rows, columns]``, with the best range per block if ``search`` asks.

    With ``gram [columns, columns]`` the search counts what each block alone adds to the squared output error, instead
    of single errors. Grids that place every value themselves (tables) have no range to shrink and are fitted as they
    are.
    """
    if search is None or not grid.searchable:
        return grid.fit(weight, importance)
    blocks, importance = grid.prepare(weight, importance)
    correlation = None if gram is None else _diagonal_blocks(gram, blocks.shape[1], blocks.shape[2])
    height = grid.height(blocks.shape[0])
    step = max(1, CHUNK // max(1, blocks[:1].numel()) // height) * height
    pieces = [
        _search(
            grid,
            blocks[start : start + step],
            None if importance is None else importance[start : start + step],
            search,
            correlation,
        )
        for start in range(0, blocks.shape[0], step)
    ]
    return grid.round({name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})


def _search(
    grid: Grid, blocks: Tensor, importance: Tensor | None, search: ClipSearch, correlation: Tensor | None
) -> Params:
    best: Params | None = None
    lowest = torch.empty(0)
    for factor in search.factors():
        proposed = grid.propose(blocks, importance, factor)
        params = grid.round(proposed)
        if correlation is None:
            error = grid.error(blocks, importance, params, search.norm)
        else:
            error = _output_error(blocks - grid.decode_blocks(grid.encode_blocks(blocks, params), params), correlation)
        error = _by_tile(error, (grid.height(blocks.shape[0]), grid.span))
        if best is None:
            best, lowest = proposed, error
            continue
        better = error < lowest
        best = {name: torch.where(_like(better, value), value, best[name]) for name, value in proposed.items()}
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


def _output_error(difference: Tensor, correlation: Tensor) -> Tensor:
    """``d^T G d`` of each block ``d [rows, groups, size]`` for ``correlation [groups, size, size]``."""
    return (torch.einsum("rgi,gij->rgj", difference, correlation) * difference).sum(-1)


def _diagonal_blocks(gram: Tensor, groups: int, size: int) -> Tensor:
    """``[groups, size, size]`` of ``gram [columns, columns]``; a short last block is completed with zeros."""
    missing = groups * size - gram.shape[0]
    padded = torch.nn.functional.pad(gram, (0, missing, 0, missing))
    return padded.unflatten(0, (groups, size)).unflatten(2, (groups, size)).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _like(flags: Tensor, value: Tensor) -> Tensor:
    """Flags of blocks, for a value that has more numbers per block."""
    return flags.unsqueeze(-1) if value.dim() > flags.dim() else flags
