"""Rows of queries in pieces that fit in memory, for estimators that look at every query."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.attention.reach import Reach
from rarefy.kernels.triton import usable

# Scores of one piece: 64 MB in float32.
SCORES_AT_ONCE = 1 << 24


def kernel_serves(query: Tensor, reach: Reach) -> bool:
    """Whether kernels that know causality and left padding can look at these queries."""
    return reach.padded_causal and usable(query.device)


def pieces(query: Tensor, width: int, block_q: int) -> Iterator[tuple[int, int]]:
    """Runs of whole blocks of the queries ``[B, H, Q, D]`` whose scores of ``width`` keys each fit in memory."""
    batch, heads, count, _ = query.shape
    at_once = max(1, SCORES_AT_ONCE // max(1, batch * heads * width * block_q)) * block_q
    for low in range(0, count, at_once):
        yield low, min(low + at_once, count)


def looked_at(low: int, high: int, count: int, block: int, every: int, device: torch.device) -> Tensor:
    """Of each block of queries in ``[low, high)``, out of ``count``, the last and each ``every``-th before it,
    int64."""
    rows = torch.arange(low, high, device=device)
    last = ((rows // block + 1) * block).clamp(max=count) - 1
    return rows[(last - rows) % every == 0]


def seen(reach: Reach, rows: Tensor, keys: Tensor) -> Tensor:
    """Whether queries ``rows [n]`` may see ``keys [k]``, bool ``[B or 1, 1 or H, n, k]``."""
    if reach.mask is not None:
        return reach.mask[:, :, rows][..., keys]
    row = torch.arange(reach.batch, device=rows.device)[:, None, None, None]
    found = reach.allowed(row, rows[:, None], keys)
    return found if found.dim() == 4 else found[None, None]


def by_blocks(x: Tensor, block: int, fill: float) -> Tensor:
    """Rows ``[B, H, Q, n]`` as blocks of rows ``[B, H, Q / block, block, n]``, the last one filled up."""
    return functional.pad(x, (0, 0, 0, -x.shape[2] % block), value=fill).unflatten(2, (-1, block))
