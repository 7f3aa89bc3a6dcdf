"""Which weights stay: the largest scores, at exactly the wanted number, whatever ties there are."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.kernels.reference.patterns import kept_of


def keep_share(scores: Tensor, sparsity: float) -> Tensor:
    """Bool mask of ``scores [..., n]`` that drops the ``round(sparsity * n)`` lowest of each row."""
    return _keep(scores, scores.shape[-1] - round(sparsity * scores.shape[-1]))


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool mask of ``scores [..., columns]`` that keeps the ``n`` largest of every ``m`` neighbours; a short last group
    of ``l`` keeps ``ceil(n * l / m)``."""
    columns = scores.shape[-1]
    whole = columns // m * m
    parts = [_keep(scores[..., :whole].unflatten(-1, (-1, m)), n).flatten(-2)] if whole else []
    if tail := columns - whole:
        parts.append(_keep(scores[..., whole:], kept_of(tail, n, m)))
    return torch.cat(parts, -1)


def _keep(scores: Tensor, count: int) -> Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)
