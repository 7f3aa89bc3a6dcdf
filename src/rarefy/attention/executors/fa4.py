"""FlashAttention 4 (the ``flash-attn-4`` wheel) over the lists of a map: the fastest for prefill in 16 bits on
Hopper."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.executors.base import Executor, executors
from rarefy.attention.source import Source
from rarefy.kernels.triton import usable

BLOCK = 128  # keys of a tile of its kernel for up to 128 channels, which a block has to be


@executors.register("fa4")
class FlashAttention4(Executor):
    """Causal maps without padding, window or packing, in blocks of 128 by 128, with 16-bit numbers of 64, 96 or 128
    channels."""

    name = "fa4"
    phases = ("prefill",)

    def missing(self, device: torch.device) -> str | None:
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
        return None if hopper and _installed() else "it needs a Hopper GPU and the package flash-attn-4"

    def tiles(self, block_q: int, block_k: int) -> bool:
        return block_q == block_k == BLOCK

    def refusal(self, query: Tensor, source: Source, block_map: BlockMap, softcap: float | None = None) -> str | None:
        reach = block_map.reach
        if (reason := self.missing(query.device)) is not None:
            return reason
        if query.requires_grad and torch.is_grad_enabled():
            return "its gradients are not those of a map"
        if query.dtype not in (torch.float16, torch.bfloat16) or query.shape[3] not in (64, 96, 128):
            return f"it has no kernel for {query.shape[3]} channels of {query.dtype}"
        if softcap is not None or block_map.level is not None:
            return "it does not bend scores and knows no levels"
        if not reach.plain or reach.window is not None or not reach.causal:
            return "it takes causal maps without padding, window or packing"
        if not self.tiles(block_map.block_q, block_map.block_k) or reach.queries < BLOCK:
            return (
                f"blocks of {block_map.block_q} by {block_map.block_k} are not those of its kernel, {BLOCK} by {BLOCK}"
            )
        if reach.offset != reach.keys - reach.queries:
            return "its queries are the last keys"
        return None

    def run(
        self, query: Tensor, source: Source, block_map: BlockMap, scaling: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        block_map = block_map.per_head(query.shape[1])
        columns, start = block_map.columns, block_map.start
        blocks = block_map.key_blocks
        rows = start.numel()
        if columns.numel() == rows * blocks:  # rows at equal distances are what it takes
            index = columns.view(*start.shape, blocks)
        else:
            index = block_map.lists(blocks, fill=0)
        # The diagonal crosses at most two blocks of keys, wherever the queries begin.
        partial, partial_index = _partial(block_map, 2)
        output, lse = _function()(
            query.transpose(1, 2), source.keys().transpose(1, 2), source.values().transpose(1, 2), scaling,
            block_map.reach.offset, partial, partial_index, block_map.whole, index,
        )  # fmt: skip
        return output.transpose(1, 2), lse


def _partial(block_map: BlockMap, width: int) -> tuple[Tensor, Tensor]:
    """`BlockMap.partial_lists`, by one kernel where there is Triton."""
    if not usable(block_map.columns.device):
        return block_map.partial_lists(width, fill=0)
    from rarefy.kernels.triton.block_select import partial_blocks

    start, whole, count = (part.contiguous() for part in (block_map.start, block_map.whole, block_map.count))
    return partial_blocks(start, whole, count, block_map.columns, width)


@functools.cache
def _installed() -> bool:
    try:
        return find_spec("flash_attn.cute.interface") is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _function() -> Any:
    """A call of the package with a mask for causality."""
    from cutlass import Int32, cute
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def causal(batch: Any, head: Any, query: Any, key: Any, info: Any, aux: Any) -> Any:
        return key <= query

    @cute.jit
    def causal_at_the_end(batch: Any, head: Any, query: Any, key: Any, info: Any, aux: Any) -> Any:
        return key <= query + scalar_to_ssa(info.seqlen_k - info.seqlen_q, Int32)

    def run(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, offset: int, partial: Tensor, partial_index: Tensor,
        whole: Tensor, index: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        lists = BlockSparseTensorsTorch(
            mask_block_cnt=partial.contiguous(), mask_block_idx=partial_index.contiguous(),
            full_block_cnt=whole.contiguous(), full_block_idx=index.contiguous(), block_size=(BLOCK, BLOCK),
        )  # fmt: skip
        found = flash_attn_func(
            query, key, value, softmax_scale=scaling, mask_mod=causal_at_the_end if offset else causal,
            block_sparse_tensors=lists, pack_gqa=False, return_lse=True,
        )  # fmt: skip
        return found[0], found[1]

    return run
