"""Small layers with correlated inputs, and what their columns would become by the textbook, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rarefy.statistics import Gram


def problem(rows: int, columns: int, tokens: int = 256, seed: int = 0) -> tuple[Tensor, Tensor, Gram]:
    """A weight, inputs ``[tokens, columns]`` with a few loud channels, and their Gram statistic."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x[:, :: max(2, columns // 5)] *= 6
    gram = Gram(columns)
    gram.update(x)
    return torch.randn(rows, columns, generator=generator) * 0.05, x, gram


def stacked(rows: int, columns: int, members: int) -> tuple[Tensor, Gram]:
    """Experts with inputs of their own."""
    gram = Gram(columns, members)
    weights = []
    for member in range(members):
        weight, x, _ = problem(rows, columns, seed=member)
        gram.update(x, member)
        weights.append(weight)
    return torch.stack(weights), gram


def output_error(weight: Tensor, stored: Tensor, gram: Gram) -> float:
    difference = (weight - stored).double()
    return float(((difference @ gram.mean().double()) * difference).sum())


def eliminate(weight: Tensor, gram: Gram, dampening: float, treat: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Column by column as in Optimal Brain Surgeon: ``treat(position, current weight [rows, columns], inverse)`` gives
    the new column, the others are corrected by the inverse Hessian, from which the column is then eliminated."""
    hessian = gram.mean().double()
    hessian += dampening * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse, work = hessian.inverse(), weight.double().clone()
    for position in range(work.shape[1]):
        new = treat(position, work, inverse)
        error = (work[:, position] - new) / inverse[position, position]
        work -= error[:, None] * inverse[position]
        work[:, position] = new
        inverse = inverse - torch.outer(inverse[:, position], inverse[position]) / inverse[position, position]
        inverse[position, :] = inverse[:, position] = 0
    return work
