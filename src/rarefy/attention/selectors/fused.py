"""Selection and the making of lists in one kernel on a GPU, which nobody waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.reach import Blocks, Reach
from rarefy.attention.selectors.base import Selector
from rarefy.kernels.triton import usable

WIDEST = 16384  # blocks of a row that one program holds


def select_map(selector: Selector, scores: Tensor, blocks: Blocks, forced: Tensor, reach: Reach) -> BlockMap:
    """The map of the blocks that ``selector`` chooses: by the kernel where there is one for its rule."""
    rule = selector.rule()
    if rule is None or not usable(scores.device) or blocks.columns > WIDEST:
        return BlockMap.from_mask(selector.select(scores, blocks.some, forced), reach, blocks)
    return fused_map(rule, scores, blocks, forced, reach)


def fused_map(rule: dict[str, Any], scores: Tensor, blocks: Blocks, forced: Tensor, reach: Reach) -> BlockMap:
    """The map of ``rule``, as `select_blocks` takes it."""
    from rarefy.kernels.triton.block_select import select_blocks

    # Of one reach the same tensors come again and again.
    key = ("flags", blocks.block_q, blocks.block_k, id(forced))
    flags, _ = reach.once(key, lambda: (_flags(blocks, forced), forced))
    start, whole, count, columns = select_blocks(scores, flags, **rule)
    return BlockMap(blocks.block_q, blocks.block_k, start, whole, count, columns, reach)


def _flags(blocks: Blocks, forced: Tensor) -> Tensor:
    some, full, always = (part.to(torch.uint8) for part in (blocks.some, blocks.full, forced))
    return some | (full << 1) | (always << 2)
