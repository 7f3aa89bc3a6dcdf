"""Search for the range that costs least: clipping a few large weights buys finer steps for all others."""

from __future__ import annotations

from typing import TypeGuard

import torch
from pydantic import Field
from torch import Tensor

from rarefy.core.config import StrictModel
from rarefy.formats.grids import Grid, IntegerGrid, Params
from rarefy.formats.grids.base import ScaledGrid, check_numbers
from rarefy.formats.layout import FLOATS
from rarefy.formats.scales import BilevelScale, SingleScale
from rarefy.kernels.column_arguments import AT_ONCE
from rarefy.kernels.native import compiled, fit_around, fits_around, search_ranges

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
    if gram is None and counts is None and fits_groups(grid, weight.device, weight.shape[1], search):
        return fit_members(grid, weight.detach()[None], None, search)
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
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def fit_members(grid: Grid, weight: Tensor, mass: Tensor | None, search: ClipSearch | None) -> Params:
    """``fit`` for ``weight [members, rows, columns]`` that has been checked, its rows one after the other; a search
    counts the error of a column by ``mass [members, columns]``, all alike without it."""
    members, rows, columns = weight.shape
    if search is not None and fits_groups(grid, weight.device, columns, search):
        mass = weight.new_ones(members, columns) if mass is None else mass
        size, never = grid.size(columns), weight.new_full((members * rows,), torch.inf)
        across, unit = weight.float().transpose(1, 2).contiguous(), weight.new_ones(members, columns)
        parts = [slice(start, start + size) for start in range(0, columns, size)]
        found = [fit_group(grid, across[:, p], unit[:, p], mass[:, p], never, search)[0] for p in parts]
        return {name: torch.cat([own[name] for own in found], dim=1) for name in found[0]}
    importance = None if search is None or mass is None else mass[:, None].expand_as(weight).flatten(0, 1)
    return fit(grid, weight.flatten(0, 1), importance, search, checked=True)


def fits_groups(grid: Grid, device: torch.device, columns: int, search: ClipSearch | None) -> TypeGuard[IntegerGrid]:
    """Whether ``fit_group`` has a kernel: for real two-level zeros whose tiles are one group of a few columns."""
    levels, factors = _second_level(grid), 0 if search is None else search.candidates
    if not isinstance(grid, IntegerGrid) or grid.zero != "float" or levels is None or levels.groups != 1:
        return False
    return fits_around(device, grid.size(columns), levels.rows, FLOATS[levels.dtype], factors)


def fit_group(
    grid: IntegerGrid, columns: Tensor, unit: Tensor, mass: Tensor, threshold: Tensor, search: ClipSearch | None
) -> tuple[Params, tuple[Tensor, Tensor]]:
    """Rounded parameters of one group by a kernel, and the scale and zero that they stand for, float32 ``[1, members *
    rows]``; arguments as of ``kernels.columns.fit_around``. Only where ``fits_groups`` says so."""
    levels = grid.scales
    assert isinstance(levels, BilevelScale)
    codes, second, scale, zero = fit_around(
        columns, unit, mass, threshold, levels=grid.code_count, bits=(levels.scale_bits, levels.zero_bits),
        tile=levels.rows, dtype=FLOATS[levels.dtype],
        factors=[] if search is None else search.factors(torch.device("cpu")).tolist(),
        norm=2.0 if search is None else search.norm,
    )  # fmt: skip
    return {"scale": codes, "second_order": second}, (scale[None], zero[None])


def _has_kernel(grid: Grid, weight: Tensor, search: ClipSearch) -> bool:
    """Whether a kernel searches: for integers whose groups have scales of their own. Others are searched in torch."""
    even = isinstance(grid, IntegerGrid) and isinstance(grid.scales, SingleScale)
    return even and compiled(weight.device) and search.candidates <= AT_ONCE and weight.numel() > 0


def _search(
    grid: Grid, blocks: Tensor, importance: Tensor | None, search: ClipSearch, correlation: Tensor | None
) -> Params:
    """Rounded parameters. Where scales are two-level each block takes the best range as if its parameters were exact;
    their tile's second level spans what it asks for, and then each block takes the best codes there."""
    rows, factors = blocks.shape[0], search.factors(blocks.device)
    levels = _second_level(grid)
    judge = grid if levels is None else grid.model_copy(update={"scales": SingleScale(dtype="float32")})
    # Small blocks try several factors at once, one below the other, unless rows of two would share parameters.
    apart = rows % judge.height(rows * len(factors)) == 0
    at_once = max(1, min(len(factors), CHUNK // max(1, blocks.numel()))) if apart else 1
    best: Params | None = None
    lowest = torch.empty(0)
    for tried in factors.split(at_once):
        count = len(tried)
        many = blocks.repeat(count, 1, 1)
        mass = None if importance is None else importance.repeat(count, 1, 1)
        proposed = grid.propose(many, mass, tried.double().repeat_interleave(rows)[:, None])
        error = _error(judge, many, mass, judge.round(proposed), search.norm, correlation)
        error, place = error.unflatten(0, (count, rows)).min(0)
        found = {name: _taken(value.unflatten(0, (count, rows)), place) for name, value in proposed.items()}
        if best is None:
            best, lowest = found, error
            continue
        better = error < lowest
        best = {name: torch.where(_like(better, value), value, best[name]) for name, value in found.items()}
        lowest = torch.where(better, error, lowest)
    assert best is not None
    params = grid.round(best)
    if levels is not None:
        lowest = torch.full_like(lowest, torch.inf)
        for choice in levels.choices(params):
            error = _error(grid, blocks, importance, choice, search.norm, correlation)
            better = error < lowest
            params = {**params, "scale": torch.where(better, choice["scale"], params["scale"])}
            lowest = torch.where(better, error, lowest)
    return params


def _second_level(grid: Grid) -> BilevelScale | None:
    return grid.scales if isinstance(grid, ScaledGrid) and isinstance(grid.scales, BilevelScale) else None


def _error(
    grid: Grid, blocks: Tensor, importance: Tensor | None, params: Params, norm: float, correlation: Tensor | None
) -> Tensor:
    """What rounded ``params`` cost each block ``[rows, groups, ...]``."""
    if correlation is None:
        return grid.error(blocks, importance, params, norm)
    return _output_error(blocks - grid.decode_blocks(grid.encode_blocks(blocks, params), params), correlation)


def _taken(values: Tensor, place: Tensor) -> Tensor:
    """``values [factors, rows, groups, ...]`` of the factor at ``place [rows, groups]``, or of one for each number."""
    place = _like(place, values[0])
    return values.gather(0, place.expand_as(values[0])[None])[0]


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
