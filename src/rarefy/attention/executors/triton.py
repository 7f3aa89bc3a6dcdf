"""The portable executor on a GPU: Triton kernels over compressed rows, for prefill and for decoding."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.executors.base import Executor, executors
from rarefy.attention.source import Source

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@executors.register("triton")
class Triton(Executor):
    """Blocks of 16 or more tokens, powers of two, any batch, padding, window and packing, lists by query or KV head."""

    name = "triton"

    def refusal(self, query: Tensor, source: Source, block_map: BlockMap, softcap: float | None = None) -> str | None:
        if not query.is_cuda or find_spec("triton") is None:
            return "it needs a GPU and Triton"
        return unfit(query, block_map, softcap)

    def run(
        self, query: Tensor, source: Source, block_map: BlockMap, scaling: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        from rarefy.kernels.triton.block_attention import block_attention

        reach = block_map.reach
        return block_attention(
            _rows(query), _rows(source.keys()), _rows(source.values()), block_map.start, block_map.whole,
            block_map.count, block_map.columns, block_q=block_map.block_q, block_k=block_map.block_k, scaling=scaling,
            offset=reach.offset, causal=reach.causal, window=reach.window, first=reach.first, stop=reach.stop,
            segment=reach.segment,
        )  # fmt: skip


def unfit(query: Tensor, block_map: BlockMap, softcap: float | None) -> str | None:
    """Why the kernel's sizes or masks do not fit; None where they do."""
    size = block_map.block_k
    if softcap is not None:
        return "it does not bend scores (softcap)"
    if block_map.level is not None:
        return "it knows no levels"
    if block_map.reach.mask is not None:
        return "the mask is none of padding, causality, a window and packed sequences"
    if size < 16 or size & (size - 1) or block_map.block_q > 128:
        return f"blocks of {block_map.block_q} queries by {size} keys do not fit its tiles"
    if query.dtype not in DTYPES or query.shape[3] > 256:
        return f"{query.shape[3]} channels of {query.dtype} do not fit its tiles"
    return None


def _rows(x: Tensor) -> Tensor:
    """``x`` with contiguous channels, which Transformers' views already have."""
    return x if x.stride(-1) == 1 else x.contiguous()
