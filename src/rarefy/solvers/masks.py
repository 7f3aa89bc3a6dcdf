"""Which weights stay: the largest scores, at exactly the wanted number, whatever ties there are."""

from __future__ import annotations

from collections.abc import Sequence

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


def largest_share(scores: Tensor, share: float, ties: Tensor) -> Tensor:
    """Bool mask of exactly the ``round(share * size)`` largest ``scores`` of a weight ``[rows, columns]``, or of each
    of its experts. Among equal scores those with the larger ``ties`` (same shape) are taken."""
    if scores.dim() == 3:
        return torch.stack([largest_share(own, share, other) for own, other in zip(scores, ties, strict=True)])
    flat, count = scores.flatten(), round(share * scores.numel())
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = flat.topk(count).values[-1]
    mask = flat > least
    tied = (flat == least).nonzero().squeeze(1)
    order = ties.flatten()[tied].argsort(descending=True, stable=True)
    mask[tied[order[: count - int(mask.sum())]]] = True
    return mask.view_as(scores)


def largest_of_each(kinds: Sequence[tuple[Tensor, float]], ties: Tensor) -> Tensor:
    """Bool mask of the largest share of each kind of (scores that are not negative, share), in turn: a kind chooses
    among what none before it took. Shapes and ``ties`` as for ``largest_share``."""
    mask = torch.zeros_like(ties, dtype=torch.bool)
    for scores, share in kinds:
        mask |= largest_share(scores.masked_fill(mask, -1.0), share, ties)
    return mask


def _keep(scores: Tensor, count: int) -> Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)
