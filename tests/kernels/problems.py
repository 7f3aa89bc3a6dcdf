"""Stretches of columns for ``rarefy::round_columns``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.formats.grids import Grid, IntegerGrid, Params
from rarefy.formats.scales import SingleScale
from rarefy.kernels.columns import Rule
from rarefy.solvers.clip import ClipSearch, _search


def stretch(rule: Rule, members: int, rows: int, count: int, width: int, rounds: bool = True) -> dict[str, Any]:
    """Arguments of ``columns.reference``, the same at each call: parts of larger tensors, groups out of order, a scale
    of zero."""
    generator = torch.Generator().manual_seed(count + width)
    block = torch.randn(members, width + 3, rows, generator=generator)[:, 2 : 2 + width] * 0.05
    shares = torch.randn(members, width, width + 5, generator=generator)[:, :count, 5:] * 0.3
    groups = [(7 * column) % 3 for column in range(count)]
    scale = torch.rand(3, members * rows, generator=generator) * 0.05
    scale[1, rows // 3] = 0
    shape = (count, members * rows)
    marked = torch.rand(shape, generator=generator) < (0.4 if rule == "drop" else 0.02)
    chooses, keeps = rule == "choose", rule in ("spare", "choose")
    return {
        "block": block, "errors": torch.full((members, count + 1, rows), torch.nan)[:, :count], "shares": shares,
        "codes": torch.full(shape, 99, dtype=torch.uint8) if rounds else None, "scale": scale if rounds else None,
        "zero": torch.rand(3, members * rows, generator=generator) * 7 if rounds else None, "groups": groups, "last": 7,
        "rule": rule, "marked": None if rule == "every" else marked,
        "lost": torch.full(shape, torch.nan) if keeps else None,
        "reach": torch.rand(members * rows, generator=generator) * 0.1 if chooses else None,
        "unit": (torch.rand(members, count + 2, generator=generator) + 0.1)[:, 1:-1] if chooses else None,
    }  # fmt: skip


def fit_problem(size: int, members: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Columns, unit, mass and threshold for ``rarefy::fit_around``: wild weights, and a row of zeros."""
    generator = torch.Generator().manual_seed(size)
    group = torch.randn(members, size, rows, generator=generator) * 0.05
    group[:, size // 2, ::3] *= 8
    group[0, :, 5] = 0
    unit, mass = torch.rand(members, size, generator=generator) + 0.2, torch.rand(members, size, generator=generator)
    return group, unit, mass, torch.rand(members * rows, generator=generator) * 2e-3


SEARCHED = [
    (IntegerGrid(num_bits=4, group_size=32, zero=zero, scales=SingleScale(dtype=dtype)), weighted)
    for zero in ("none", "integer", "float") for dtype in ("float16", "bfloat16", "float32")
    for weighted in (False, True)
] + [(IntegerGrid(num_bits=3), True), (IntegerGrid(num_bits=2, group_size=300, zero="integer"), True)]  # fmt: skip


def range_problem(weighted: bool) -> tuple[Tensor, Tensor | None]:
    """A weight ``[13, 330]`` with groups of equal values and of zeros, and how much its errors count."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 330, generator=generator) * 0.05
    weight[2, :96], weight[3, 32:64], weight[4, :64] = 0.25, 0.0, -0.5
    weight[5, 64:128] += 3
    importance = torch.rand(13, 330, generator=generator)
    importance[7, :128] = 0
    return weight, importance if weighted else None


def searched_in_torch(grid: Grid, weight: Tensor, importance: Tensor | None) -> Params:
    """What ``clip.fit`` finds without a kernel."""
    return _search(grid, *grid.prepare(weight, importance), ClipSearch(), None)
