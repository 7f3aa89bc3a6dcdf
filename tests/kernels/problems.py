"""Stretches of columns for ``rarefy::round_columns``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.kernels.columns import Rule


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
