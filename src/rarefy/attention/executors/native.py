"""The executor of the native library: tiles of queries over panels of the listed keys, on all threads."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.executors.base import Executor, executors
from rarefy.attention.policy import FEW
from rarefy.attention.source import Source
from rarefy.kernels.cpu.blocks import attend_blocks, available, fits
from rarefy.kernels.cpu.library import instructions


@executors.register("native")
class Native(Executor):
    """Blocks of any size for passes of many tokens, with padding, windows and packing; lists by query head cost as
    little as those by KV head. In bf16 products are of bf16 pairs where the processor has them, as torch's are."""

    name = "native"
    phases = ("prefill",)

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "it runs on a processor"
        if not available() or instructions() == "scalar":
            return "there is no native library here" + (" with wide registers" if available() else "")
        return None

    def refusal(self, query: Tensor, source: Source, block_map: BlockMap, softcap: float | None = None) -> str | None:
        if (reason := self.missing(query.device)) is not None:
            return reason
        if query.requires_grad and torch.is_grad_enabled():
            return "it keeps no gradients"
        if softcap is not None or block_map.level is not None:
            return "it does not bend scores and knows no levels"
        if block_map.reach.mask is not None:
            return "the mask is none of padding, causality, a window and packed sequences"
        if query.shape[2] <= FEW:
            return "it puts all keys into panels, which few queries do not repay"
        if not fits(query, source.values(0, 0), block_map.block_q):
            return f"{query.shape[3]} channels of {query.dtype} do not fit its panels"
        return None

    def run(
        self, query: Tensor, source: Source, block_map: BlockMap, scaling: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        low, high = (part.expand(query.shape[0], -1) for part in block_map.reach.spans())
        return attend_blocks(
            query, source.keys(), source.values(), block_map.start, block_map.count, block_map.columns, low, high,
            block_q=block_map.block_q, block_k=block_map.block_k, scaling=scaling,
        )  # fmt: skip
