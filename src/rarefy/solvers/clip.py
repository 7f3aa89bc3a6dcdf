"""Search for the range that costs least: clipping a few large weights buys finer steps for all others."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from rarefy.core.config import StrictModel
from rarefy.formats.grids import Grid, IntegerGrid, Params
from rarefy.formats.grids.base import check_numbers
from rarefy.formats.layout import FLOATS
from rarefy.formats.scales import SingleScale
from rarefy.kernels.column_arguments import AT_ONCE
from rarefy.kernels.native import compiled, search_ranges

CHUNK = 1 << 22  # values handled at once, to stay in cache and bound memory


class ClipSearch(StrictModel):
    """``candidates`` factors evenly from 1 down to ``smallest``, judged by ``sum importance * |error| ** norm``.

    (The search of GPTQ's reference quantizer, Frantar et al. 2022, with its exponent 2.4; both ends shrink alike.)
    """

    norm: float = Field(2.4, gt=0)
    candidates: int = Field(20, ge=1)
    smallest: float = Field(0.5, gt=0, le=1)

    def factors(self, device: torch.device) -> Tensor:
        return torch.linspace(1.0, self.smallest, self.candidates).to(device)


def fit(
    grid: Grid,
    weight: Tensor,
    importance: Tensor | None = None,
    search: ClipSearch | None = None,
    gram: Tensor | None = None,
    checked: bool = False,
) -> Params:
    """Rounded parameters of ``grid`` for ``weight [rows, columns]``, with the best range per block if ``search`` asks.

    With ``gram [columns, columns]`` the search counts what each block alone adds to the squared output error, instead
    of single errors. Grids that place every value themselves (tables) have no range to shrink and are fitted as they
    are. Nothing waits for the device where numbers have been ``checked`` before, and parameters are checked when terms
    are made of them; otherwise FormatError says what is not finite.
    """
    if not checked:
        check_numbers(weight, importance)
    counts = None if importance is None else importance.detach().float()
    blocks, importance = grid.prepare(weight, importance)
    if search is None or not grid.searchable:
        return grid.round(grid.propose(blocks, importance))
    if gram is None and _has_kernel(grid, weight, search):
        assert isinstance(grid, IntegerGrid)
        shrink = search_ranges(
            weight.detach().float(), counts, search.factors(torch.device("cpu")).tolist(), search.norm,
            group_size=grid.size(weight.shape[1]), levels=grid.code_count, zero=grid.zero,
            dtype=FLOATS[grid.scales.dtype],
        )  # fmt: skip
        return grid.round(grid.propose(blocks, importance, shrink.double()))
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


def _has_kernel(grid: Grid, weight: Tensor, search: ClipSearch) -> bool:
    """Whether a kernel searches: for integers whose groups have scales of their own. Others are searched in torch."""
    even = isinstance(grid, IntegerGrid) and isinstance(grid.scales, SingleScale)
    return even and compiled(weight.device) and search.candidates <= AT_ONCE and weight.numel() > 0


def _search(
    grid: Grid, blocks: Tensor, importance: Tensor | None, search: ClipSearch, correlation: Tensor | None
) -> Params:
    rows, factors = blocks.shape[0], search.factors(blocks.device)
    tile = grid.height(rows), grid.span
    # Small blocks try several factors at once, one below the other, unless rows of two would share parameters.
    apart = rows % grid.height(rows * len(factors)) == 0
    at_once = max(1, min(len(factors), CHUNK // max(1, blocks.numel()))) if apart else 1
    best: Params | None = None
    lowest = torch.empty(0)
    for tried in factors.split(at_once):
        count = len(tried)
        many = blocks.repeat(count, 1, 1)
        mass = None if importance is None else importance.repeat(count, 1, 1)
        proposed = grid.propose(many, mass, tried.double().repeat_interleave(rows)[:, None])
        params = grid.round(proposed)
        if correlation is None:
            error = grid.error(many, mass, params, search.norm)
        else:
            error = _output_error(many - grid.decode_blocks(grid.encode_blocks(many, params), params), correlation)
        error, place = _by_tile(error, tile).unflatten(0, (count, rows)).min(0)
        found = {name: _taken(value.unflatten(0, (count, rows)), place) for name, value in proposed.items()}
        if best is None:
            best, lowest = found, error
            continue
        better = error < lowest
        best = {name: torch.where(_like(better, value), value, best[name]) for name, value in found.items()}
        lowest = torch.where(better, error, lowest)
    assert best is not None
    return best


def _taken(values: Tensor, place: Tensor) -> Tensor:
    """``values [factors, rows, groups, ...]`` of the factor at ``place [rows, groups]``, or of one for each number."""
    place = _like(place, values[0])
    return values.gather(0, place.expand_as(values[0])[None])[0]


def _by_tile(error: Tensor, tile: tuple[int, int]) -> Tensor:
    """Errors ``[rows, groups, ...]`` summed over each tile of parameters that are rounded together and so have to
    choose together, at every place of it."""
    for dim, size in enumerate(tile):
        if size > 1:
            length = error.shape[dim]
            missing = error.new_zeros([-length % size if at == dim else n for at, n in enumerate(error.shape)])
            tiles = torch.cat([error, missing], dim).unflatten(dim, (-1, size)).sum(dim + 1, keepdim=True)
            error = tiles.expand(*tiles.shape[: dim + 1], size, *tiles.shape[dim + 2 :]).flatten(dim, dim + 1)
            error = error.narrow(dim, 0, length)
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
