"""Numbers that make up best for others that are fixed: least squares in a layer's output."""

from __future__ import annotations

import torch
from torch import Tensor


def fit_kept(weight: Tensor, hessian: Tensor, mask: Tensor, start: Tensor, steps: int) -> Tensor:
    """``argmin |(weight - x) X|^2`` over ``x [rows, columns]`` that is zero outside ``mask``, from ``start`` on.

    ``hessian [columns, columns]`` is ``X X^T``, positive definite. By ``steps`` of conjugate gradients for all rows at
    once, scaled by the diagonal: a matrix product each, where a factorization would be needed for each row's own mask.
    (Hestenes and Stiefel 1952.)
    """
    free, scale = mask.to(weight.dtype), hessian.diagonal().reciprocal()
    x = start * free
    residual = ((weight - x) @ hessian) * free
    step = residual * scale
    squared = (residual * step).sum(1, keepdim=True)
    for _ in range(steps):
        image = (step @ hessian) * free
        # A row that has arrived takes steps of zero.
        length = squared / (step * image).sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        x = torch.addcmul(x, length, step)
        residual = torch.addcmul(residual, length, image, value=-1)
        scaled = residual * scale
        before, squared = squared, (residual * scaled).sum(1, keepdim=True)
        step = torch.addcmul(scaled, squared / before.clamp(min=torch.finfo(weight.dtype).tiny), step)
    return x


def fit_scales(weight: Tensor, hessian: Tensor, parts: Tensor, size: int) -> Tensor:
    """``argmin |(weight - s * parts) X|^2`` over a factor ``s`` for each group of ``size`` columns of each row.

    ``weight`` and ``parts`` are float32 ``[rows, columns]``, ``hessian [columns, columns]`` is ``X X^T``; returns
    float32 ``[rows, groups]``, 0 for groups of zeros and in rows whose groups cannot be told apart.
    """
    rows, columns = weight.shape
    missing = -columns % size
    moved = torch.nn.functional.pad(weight @ hessian, (0, missing)).unflatten(1, (-1, size))
    parts = torch.nn.functional.pad(parts, (0, missing)).unflatten(1, (-1, size))
    wide = torch.nn.functional.pad(hessian, (0, missing, 0, missing)).unflatten(1, (-1, size))
    groups = parts.shape[1]
    normal = parts.new_empty(rows, groups, groups)
    for group in range(groups):  # images of one group's part in all columns, against the parts of all groups
        image = (parts[:, group] @ wide[:, group].T).unflatten(1, (-1, size))
        normal[:, :, group] = (parts * image).sum(-1)
    empty = normal.diagonal(dim1=1, dim2=2) <= 0
    normal.diagonal(dim1=1, dim2=2).masked_fill_(empty, 1.0)
    lower, failed = torch.linalg.cholesky_ex(normal)
    found = torch.cholesky_solve((parts * moved).sum(-1, keepdim=True), lower).squeeze(-1)
    return found.masked_fill(empty | (failed != 0)[:, None], 0.0)
