"""FlexAttention of torch over the lists of a map: compiled on a GPU; on a CPU its eager form, which is dense."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rarefy.attention.block_map import BlockMap
from rarefy.attention.executors.base import Executor, executors
from rarefy.attention.source import Source


@executors.register("flex")
class Flex(Executor):
    """Any reach that is not a mask of its own; on a GPU blocks that torch's kernel can tile, and at least 128 queries
    (below that it takes another kernel, which reads other lists)."""

    name = "flex"

    def refusal(self, query: Tensor, source: Source, block_map: BlockMap, softcap: float | None = None) -> str | None:
        if block_map.reach.mask is not None or block_map.level is not None:
            return "it takes neither levels nor a mask of another kind"
        if not query.is_cuda and query.requires_grad and torch.is_grad_enabled():
            return "it has no gradients on a processor"
        size = block_map.block_k
        if query.is_cuda and (query.shape[2] < 128 or block_map.block_q < 64 or size < 64 or size.bit_count() > 1):
            return f"{query.shape[2]} queries in blocks of {block_map.block_q} by {size} do not fit its kernel"
        return None

    def run(
        self, query: Tensor, source: Source, block_map: BlockMap, scaling: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        heads, reach = query.shape[1], block_map.reach
        block_map = block_map.per_head(heads)
        width = block_map.key_blocks
        partial, partial_index = block_map.partial_lists(width, fill=0)
        keep = None if query.is_cuda else block_map.dense()

        def mask(row: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
            seen = reach.allowed(row if reach.batch > 1 else torch.zeros_like(row), query_index, key_index)
            if keep is None:
                return seen
            # The eager form masks all scores and knows nothing of lists.
            return seen & keep[row, head, query_index // block_map.block_q, key_index // block_map.block_k]

        blocks = BlockMask.from_kv_blocks(
            partial, partial_index, block_map.whole, block_map.lists(width, fill=0),
            BLOCK_SIZE=(block_map.block_q, block_map.block_k), mask_mod=mask,
            seq_lengths=(query.shape[2], reach.keys), compute_q_blocks=query.requires_grad,
        )  # fmt: skip
        score = None if softcap is None else functools.partial(_bend, softcap)
        output, lse = _attention(query.is_cuda)(
            query, source.keys(), source.values(), score_mod=score, block_mask=blocks, scale=scaling,
            enable_gqa=heads != source.heads, return_lse=True,
        )  # fmt: skip
        return output, lse


def _bend(softcap: float, score: Tensor, *place: Tensor) -> Tensor:
    return softcap * torch.tanh(score / softcap)


@functools.cache
def _attention(compiled: bool) -> Callable[..., Any]:
    function: Any = flex_attention  # what its type calls a function is no Callable to mypy
    return torch.compile(function, dynamic=False) if compiled else function
