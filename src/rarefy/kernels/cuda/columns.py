"""``kernels/columns.py`` on GPUs, where PyTorch's CUDA compiler is at hand: round_columns.cu and fit_around.cu."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.kernels import columns
from rarefy.kernels.column_arguments import fit_arguments, round_parts, search_arguments
from rarefy.kernels.cuda import driver
from rarefy.kernels.cuda.linear import status

ROUND, FIT, SEARCH = (
    Path(__file__).with_name(name) for name in ("round_columns.cu", "fit_around.cu", "search_ranges.cu")
)
WARPS = 4  # of a block of 32 rows
FIT_WARPS = 4  # of a block of 32 rows, that share the factors
SEARCH_WARPS = 8  # rows of a block
# 2 stages of 16 columns' shares in 128 columns, and the errors of 16 columns of 32 rows.
SHARED = 4 * (2 * 16 * 128 + 16 * 32)


@functools.cache
def round_macros(rounds: bool, rule: columns.Rule, fused: bool = False) -> tuple[str, ...]:
    """What ``round_columns.cu`` is told at compile time. Torch rounds products before it adds them on GPUs, and so do
    the kernels; not ``fused``, both have the same bits."""
    return (
        f"-DROUND={int(rounds)}", f"-DRULE={columns.RULES.index(rule)}", f"-DWARPS={WARPS}", f"-DFUSED={int(fused)}",
        "-DHALF=1",
    )  # fmt: skip


@functools.cache
def fit_macros(size: int, levels: int, bits: tuple[int, ...], tile: int, searches: bool, half: bool) -> tuple[str, ...]:
    """What ``fit_around.cu`` is told at compile time."""
    named = dict(
        SIZE=size, TILE=tile, LEVELS=levels, SCALE_BITS=bits[0], ZERO_BITS=bits[1], SEARCH=int(searches),
        WARPS=FIT_WARPS if searches else 1, HALF=int(half),
    )  # fmt: skip
    return tuple(f"-D{name}={value}" for name, value in named.items())


@functools.cache
def kernel(device: int, source: Path, macros: tuple[str, ...], shared: int) -> driver.Kernel:
    """The kernel of ``source``, compiled once in a process: no product and sum in one but where the source says so."""
    with torch.cuda.device(device):
        return driver.Kernel(source, f"rarefy_{source.stem}", [*macros, "-fmad=false"], shared)


def available() -> bool:
    """Whether these kernels can be compiled here."""
    return status() == "cuda"


def _round_columns(
    block: Tensor, errors: Tensor, shares: Tensor, codes: Tensor | None, scale: Tensor | None, zero: Tensor | None,
    groups: list[int], last: int, rule: str, marked: Tensor | None, lost: Tensor | None, reach: Tensor | None,
    unit: Tensor | None,
) -> None:  # fmt: skip
    if not available():
        columns.reference(block, errors, shares, codes, scale, zero, groups, last, rule, marked, lost, reach, unit)
        return
    members, _, rows = errors.shape
    run = kernel(block.device.index, ROUND, round_macros(codes is not None, rule), SHARED)
    stream = torch.cuda.current_stream(block.device).cuda_stream
    grid, threads = (-(-rows // 32), members, 1), 32 * WARPS
    for given in round_parts(block, errors, shares, codes, scale, zero, groups, last, marked, lost, reach, unit):
        run(grid, threads, given, stream)


def _fit_around(
    group: Tensor, unit: Tensor, mass: Tensor, threshold: Tensor, factors: list[float], norm: float, levels: int,
    bits: list[int], tile: int, half: bool,
) -> Any:  # fmt: skip
    found = columns.empty_fit(group, bits, tile, half)
    macros = fit_macros(group.shape[1], levels, tuple(bits), tile, bool(factors), half)
    run = kernel(group.device.index, FIT, macros, 256 * FIT_WARPS)
    given = fit_arguments(group, unit, mass, threshold, factors, norm, half, found)
    stream = torch.cuda.current_stream(group.device).cuda_stream
    run((-(-group.shape[0] * group.shape[2] // 32), 1, 1), 32 * (FIT_WARPS if factors else 1), given, stream)
    return found


def _search_ranges(
    weight: Tensor, importance: Tensor | None, factors: list[float], norm: float, group_size: int, levels: int,
    zero: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    found, weight = columns.empty_search(weight, group_size), weight.contiguous()
    importance = None if importance is None else importance.contiguous()
    if not found.numel():
        return found
    run = kernel(weight.device.index, SEARCH, ("-DHALF=1",), 0)
    given = search_arguments(weight, importance, factors, norm, group_size, levels, zero, dtype, found)
    stream = torch.cuda.current_stream(weight.device).cuda_stream
    run((found.shape[1], -(-weight.shape[0] // SEARCH_WARPS), 1), 32 * SEARCH_WARPS, given, stream)
    return found


_OPS: dict[str, Callable[..., Any]] = {
    "round_columns": _round_columns, "fit_around": _fit_around, "search_ranges": _search_ranges,
}  # fmt: skip
columns.add_engine("cuda", columns.Engine(available, _OPS, most_rows=32))
