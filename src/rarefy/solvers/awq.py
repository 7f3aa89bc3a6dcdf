"""The scale of each input channel that makes rounding cost least (AWQ, Lin et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.formats.grids import Grid
from rarefy.solvers.rtn import round_to_nearest

SMALLEST = 1e-4


def search_input_scale(
    weights: Sequence[Tensor], gram: Tensor, size: Tensor, grid: Grid, steps: int = 20
) -> tuple[Tensor, float]:
    """The factor ``s [in]`` for the columns of ``weights`` (``[out, in]``, all of one input), and its exponent.

    Among ``s = size ** r`` for ``r`` = 0, 1 / steps, ... (normalised to ``sqrt(max * min) = 1``) the one with the least
    ``sum |(round(W s) / s - W) X|^2``, known from ``gram [in, in]``; ``size [in]`` is the mean ``|x|`` of a column, and
    a column that never had an input counts as one with the mean input, so that its weights are not scaled away.
    (AWQ, equation 5; the output judged is that of the layers themselves.)
    """
    size = torch.where(size > 0, size, size.mean())
    best, exponent, lowest = torch.ones_like(size), 0.0, float("inf")
    for step in range(steps):
        factor = size.pow(step / steps).clamp(min=SMALLEST)
        factor = factor / (factor.max() * factor.min()).sqrt()
        cost = 0.0
        for weight in weights:
            lost = round_to_nearest(weight * factor, grid).decode() / factor - weight
            cost += float(((lost @ gram) * lost).sum(dtype=torch.float64))
        if cost < lowest:
            best, exponent, lowest = factor, step / steps, cost
    return best, exponent
