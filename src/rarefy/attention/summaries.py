"""Blocks of tokens summed up as they were before rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rarefy.attention.pooling import highest, lowest, mean
from rarefy.kernels.triton import usable
from rarefy.kv.rotary import unrotate

Pool = Literal["max", "min", "mean"]
POOLS = {"max": highest, "min": lowest, "mean": mean}


def summaries(x: Tensor, counts: Tensor | None, cos: Tensor, sin: Tensor, pools: Sequence[Pool]) -> Tensor:
    """Blocks ``x [B, H, N, block, D]`` of tokens after rotary embedding by ``cos`` and ``sin [B or 1, N * block,
    rotated channels]``, summed up by ``pools`` as they were before it: float32 ``[B, H, N, pools * D]``. ``counts``:
    which tokens count, as in ``pooling.pooled``."""
    if usable(x.device) and counts is None and cos.shape[-1] == x.shape[-1]:
        from rarefy.kernels.triton.block_summaries import block_summaries

        return block_summaries(x, cos, sin, pools)
    before = unrotate(x.flatten(2, 3), cos[:, None], sin[:, None]).unflatten(2, x.shape[2:4])
    return torch.cat([POOLS[kind](before, counts) for kind in pools], -1)
