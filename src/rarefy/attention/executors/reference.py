"""The oracle of all executors: softmax in float32 over tokens of the listed blocks, gathered row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.compact import compact
from rarefy.attention.executors.base import Executor, executors
from rarefy.attention.source import Source


@executors.register("reference")
class Reference(Executor):
    """Every map, dtype and device; slow. Each token is masked by the map's reach, wherever the map lists its block.

    A block of level ``f`` has means of ``2**f`` neighbouring keys and values in their place, each of which counts as
    often as it has members, all of which the query must reach.
    """

    name = "reference"

    def refusal(self, query: Tensor, source: Source, block_map: BlockMap, softcap: float | None = None) -> str | None:
        return None

    def run(
        self, query: Tensor, source: Source, block_map: BlockMap, scaling: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        source, block_map = compact(source, block_map)
        heads, kv_heads = query.shape[1], source.heads
        block_map = block_map.per_head(heads)
        keys, values = source.keys(), source.values()
        own = torch.arange(heads, device=query.device) // (heads // kv_heads)
        size = block_map.block_k
        lists, levels = block_map.lists(), block_map.levels()
        within = torch.arange(size, device=query.device)
        outputs, sums = [], []
        for row in range(block_map.rows):
            low, high = row * block_map.block_q, min((row + 1) * block_map.block_q, query.shape[2])
            width = int(block_map.count[:, :, row].max())
            columns = lists[:, :, row, :width].long()
            tokens = torch.where(columns[..., None] >= 0, columns[..., None] * size + within, -1).flatten(2)
            tokens = torch.where(tokens < block_map.reach.keys, tokens, -1)
            k, v = (_gathered(side, tokens, own) for side in (keys, values))
            seen = block_map.reach.between(low, high, tokens)
            bias: Tensor | float = 0.0
            if levels is not None:
                bias, k, v, seen = _joined(levels[:, :, row, :width], k, v, seen, size)
            scores = torch.matmul(query[:, :, low:high].float(), k.mT) * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = (scores + bias).masked_fill(~seen, -torch.inf)
            # NaN among keys that are seen must show; those that no query sees do not count.
            lse = scores.logsumexp(-1)
            shares = (scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
            v = v.masked_fill(~seen.any(2)[..., None], 0.0)
            outputs.append(torch.matmul(shares, v).to(query.dtype))
            sums.append(lse)
        return torch.cat(outputs, 2), torch.cat(sums, 2)


def _gathered(side: Tensor, tokens: Tensor, own: Tensor) -> Tensor:
    """``side [B, Hkv, L, D]`` at ``tokens [B, H, n]`` of each query head's KV head, float32 ``[B, H, n, D]``."""
    index = tokens.clamp(min=0)[..., None].expand(*tokens.shape, side.shape[3])
    return side[:, own].gather(2, index).float()


def _joined(
    level: Tensor, keys: Tensor, values: Tensor, seen: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of neighbours where a block's ``level [B, H, n]`` is above 0: the logarithm of how many each stands for,
    and what replaces keys, values ``[B, H, n * size, D]`` and ``seen [B, H, Q, n * size]``."""
    bias = torch.zeros_like(keys[..., 0])
    for power in range(1, int(level.max()) + 1):
        many = 1 << power
        here = (level == power)[..., None].expand(*level.shape, size).flatten(2)
        head = here & (torch.arange(here.shape[-1], device=here.device) % many == 0)
        keys, values = (
            torch.where(here[..., None], side.unflatten(2, (-1, many)).mean(3).repeat_interleave(many, 2), side)
            for side in (keys, values)
        )
        together = seen.unflatten(3, (-1, many)).all(4).repeat_interleave(many, 3)
        seen = torch.where(here[:, :, None], together & head[:, :, None], seen)
        bias = torch.where(here, float(torch.tensor(many).log()), bias)
    return bias[:, :, None], keys, values, seen
