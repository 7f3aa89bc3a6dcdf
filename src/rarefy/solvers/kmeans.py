"""k-means of vectors, for codebooks."""

from __future__ import annotations

import torch
from torch import Tensor

# Distances held at once: 64 MB in float32.
DISTANCES_AT_ONCE = 1 << 24


def kmeans(points: Tensor, count: int, *, weight: Tensor | None = None, steps: int = 25, seed: int = 0) -> Tensor:
    """``count`` centroids of least squared distance to ``points [..., n, d]``, float32 ``[..., count, d]`` (Lloyd
    1982).

    ``weight`` float ``[..., n]``, positive, is what a point's squared distance counts (None: all the same). The start
    is a random choice of points; a centroid that no point is nearest to moves to the point that is farthest from its
    own. Fewer points than centroids are their own centroids, repeated.
    """
    before, (size, width) = points.shape[:-2], points.shape[-2:]
    points = points.float().reshape(-1, size, width)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    mass = points.new_ones(points.shape[:2]) if weight is None else weight.float().reshape(-1, size)
    centers = points[:, order[torch.arange(count) % size].to(points.device)].clone()
    weighed = points * mass[..., None]
    for _ in range(steps):
        nearest, distance = assign(points, centers)
        sums = torch.zeros_like(centers).scatter_add_(1, nearest[..., None].expand_as(points), weighed)
        sizes = torch.zeros_like(centers[..., 0]).scatter_add_(1, nearest, mass)
        empty = sizes == 0
        moved = torch.where(empty[..., None], centers, sums / sizes[..., None])
        for number in empty.any(-1).nonzero().flatten().tolist() if size > count else ():
            far = (mass[number] * distance[number]).topk(int(empty[number].sum())).indices
            moved[number, empty[number]] = points[number, far]
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers.reshape(*before, count, width)


def assign(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of ``centers [..., count, d]`` for each of ``points [..., n, d]``, int64 ``[..., n]``, and its
    squared distance."""
    before, size, count = points.shape[:-1], points.shape[-2], centers.shape[-2]
    points, centers = (each.reshape(-1, *each.shape[-2:]) for each in (points, centers))
    # Libraries of CPUs are slow at batches of products of so few channels.
    problems = max(1, DISTANCES_AT_ONCE // (size * count)) if points.is_cuda else 1
    half, rows = centers.square().sum(-1) / 2, max(1, DISTANCES_AT_ONCE // count)
    found = []
    for start in range(0, len(points), problems):
        own = slice(start, start + problems)
        of_rows = []
        for part in points[own].split(rows, 1):
            if problems == 1:
                closeness = torch.addmm(half[start], part[0], centers[start].T, beta=-1)[None]
            else:
                closeness = torch.baddbmm(half[own, None], part, centers[own].mT, beta=-1)
            of_rows.append(closeness.max(-1))
        found.append([torch.cat(each, 1) for each in zip(*of_rows, strict=True)])
    closeness, nearest = (torch.cat(each).reshape(before) for each in zip(*found, strict=True))
    return nearest, (points.square().sum(-1).reshape(before) - 2 * closeness).clamp(min=0)
