"""Sums in an order that every device can keep, so that kernels find the very numbers that codecs do."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_sum(x: Tensor) -> Tensor:
    """Sums ``[..., 1]`` of ``x [..., n]``: of numbers half a vector apart, then of half as many, and so on; zeros fill
    it up to a power of two."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x


def norm(x: Tensor) -> Tensor:
    """Euclidean norms ``[..., 1]`` of ``x [..., n]``."""
    # Roots in single precision are not the nearest number on every processor.
    return tree_sum(x.square()).double().sqrt().to(x.dtype)
