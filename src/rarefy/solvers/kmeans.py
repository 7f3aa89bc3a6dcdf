"""k-means of vectors, for codebooks."""

from __future__ import annotations

import torch
from torch import Tensor

# Distances held at once: 64 MB in float32.
DISTANCES_AT_ONCE = 1 << 24


def kmeans(points: Tensor, count: int, *, weight: Tensor | None = None, steps: int = 25, seed: int = 0) -> Tensor:
    """``count`` centroids of least squared distance to ``points [n, d]``, float32 ``[count, d]`` (Lloyd 1982).

    ``weight`` float ``[n]``, positive, is what a point's squared distance counts (None: all the same). The start is a
    random choice of points; a centroid that no point is nearest to moves to the point that is farthest from its own.
    Fewer points than centroids are their own centroids, repeated.
    """
    points = points.float()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(points), generator=generator)
    mass = torch.ones(len(points), device=points.device) if weight is None else weight.float()
    centers = points[order[torch.arange(count) % len(points)].to(points.device)].clone()
    for _ in range(steps):
        nearest, distance = assign(points, centers)
        sums = torch.zeros_like(centers).index_add_(0, nearest, points * mass[:, None])
        sizes = torch.zeros_like(centers[:, 0]).index_add_(0, nearest, mass)
        moved = torch.where(sizes[:, None] > 0, sums / sizes[:, None], centers)
        empty = (sizes == 0).nonzero().squeeze(1)
        if len(empty) and len(points) > count:
            moved[empty] = points[(mass * distance).topk(len(empty)).indices]
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers


def assign(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of ``centers [count, d]`` for each of ``points [n, d]``, int64 ``[n]``, and its squared distance."""
    half = centers.square().sum(-1) / 2
    nearest, distance = [], []
    for part in points.split(max(1, DISTANCES_AT_ONCE // len(centers))):
        closeness, index = torch.addmm(half, part, centers.T, beta=-1).max(-1)
        nearest.append(index)
        distance.append((part.square().sum(-1) - 2 * closeness).clamp(min=0))
    return torch.cat(nearest), torch.cat(distance)
