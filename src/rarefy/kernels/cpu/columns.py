"""``kernels/columns.py`` by the native library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rarefy.kernels import columns
from rarefy.kernels.column_arguments import fit_arguments, round_parts, search_arguments
from rarefy.kernels.cpu.library import _loaded, available, follow_threads


def _round_columns(
    block: Tensor, errors: Tensor, shares: Tensor, codes: Tensor | None, scale: Tensor | None, zero: Tensor | None,
    groups: list[int], last: int, rule: str, marked: Tensor | None, lost: Tensor | None, reach: Tensor | None,
    unit: Tensor | None,
) -> None:  # fmt: skip
    if not available():
        columns.reference(block, errors, shares, codes, scale, zero, groups, last, rule, marked, lost, reach, unit)
        return
    follow_threads()
    number = columns.RULES.index(rule)  # type: ignore[arg-type]
    for given in round_parts(block, errors, shares, codes, scale, zero, groups, last, marked, lost, reach, unit):
        _loaded().rarefy_round_columns(ctypes.byref(given), number)


def _fit_around(
    group: Tensor, unit: Tensor, mass: Tensor, threshold: Tensor, factors: list[float], norm: float, levels: int,
    bits: list[int], tile: int, half: bool,
) -> Any:  # fmt: skip
    found = columns.empty_fit(group, bits, tile, half)
    follow_threads()
    given = fit_arguments(group, unit, mass, threshold, factors, norm, half, found)
    _loaded().rarefy_fit_around(ctypes.byref(given), group.shape[1], levels, *bits, tile, int(half))
    return found


def _search_ranges(
    weight: Tensor, importance: Tensor | None, factors: list[float], norm: float, group_size: int, levels: int,
    zero: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    found, weight = columns.empty_search(weight, group_size), weight.contiguous()
    importance = None if importance is None else importance.contiguous()
    follow_threads()
    given = search_arguments(weight, importance, factors, norm, group_size, levels, zero, dtype, found)
    _loaded().rarefy_search_ranges(ctypes.byref(given))
    return found


_OPS: dict[str, Callable[..., Any]] = {
    "round_columns": _round_columns, "fit_around": _fit_around, "search_ranges": _search_ranges,
}  # fmt: skip
columns.add_engine("cpu", columns.Engine(available, _OPS, most_rows=64))
