"""Attention problems, maps over them, and the oracle: softmax in float64 over a mask of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.reach import Reach

TOKENS = 70
# What a query may see, by name; all but the last two for a batch of any size.
REACHES: dict[str, Callable[[], Reach]] = {
    "square": lambda: Reach.last(TOKENS, TOKENS),
    "chunk": lambda: Reach.last(40, TOKENS),
    "one query": lambda: Reach.last(1, TOKENS),
    "whole blocks": lambda: Reach.last(64, 64),
    "window": lambda: Reach(TOKENS, TOKENS, 0, window=20),
    "window of a chunk": lambda: Reach(40, TOKENS, 30, window=20),
    "filled buffer": lambda: Reach(20, TOKENS, 25, stop=torch.tensor([45, 45])),
    "both ways": lambda: Reach.last(TOKENS, TOKENS, causal=False),
    "left padding": lambda: Reach(TOKENS, TOKENS, 0, first=torch.tensor([0, 19])),
    "right padding": lambda: Reach(TOKENS, TOKENS, 0, stop=torch.tensor([TOKENS, 51])),
    "packed": lambda: Reach(TOKENS, TOKENS, 0, segment=(torch.arange(TOKENS) >= 30).long().expand(2, -1)),
    "any mask": lambda: Reach(
        TOKENS, TOKENS, 0, mask=torch.rand(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.4
    ),
}


def token_mask(reach: Reach, batch: int, heads: int) -> Tensor:
    """Which keys each query may see, written down without the help of `Reach`: bool ``[B, H, queries, keys]``."""
    seen = torch.ones(batch, heads, reach.queries, reach.keys, dtype=torch.bool)
    if reach.mask is not None:
        return seen & reach.mask
    for query in range(reach.queries):
        place = query + reach.offset
        for key in range(reach.keys):
            for row in range(batch):
                ok = not (reach.causal and key > place)
                ok &= reach.window is None or key > place - reach.window
                ok &= reach.first is None or key >= int(reach.first[row])
                ok &= reach.stop is None or key < int(reach.stop[row])
                ok &= reach.segment is None or bool(reach.segment[row, key] == reach.segment[row, place])
                seen[row, :, query, key] = ok
    return seen


def tensors(reach: Reach, batch: int = 2, heads: int = 4, kv_heads: int = 2, channels: int = 8) -> tuple[Tensor, ...]:
    """Query, key and value."""
    query = torch.randn(batch, heads, reach.queries, channels)
    return query, torch.randn(batch, kv_heads, reach.keys, channels), torch.randn(batch, kv_heads, reach.keys, channels)


def oracle(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of ``seen``, and its log-sum-exp; a query that sees nothing gives zero."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(group, 1) for part in (key, value))
    scores = query.double() @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ value).float(), scores.logsumexp(-1).float()


def random_map(
    reach: Reach, batch: int, heads: int, block_q: int = 16, block_k: int = 16, share: float = 0.5
) -> BlockMap:
    """Random blocks; a row may be without any."""
    blocks = reach.blocks(block_q, block_k)
    return BlockMap.from_mask(torch.rand(batch, heads, blocks.rows, blocks.columns) < share, reach, blocks)


def tokens_of(block_map: BlockMap, heads: int) -> Tensor:
    """The tokens of kept blocks, bool ``[B, H, queries, keys]``, whether in reach or not."""
    keep = block_map.dense().repeat_interleave(heads // block_map.count.shape[1], 1)
    keep = keep.repeat_interleave(block_map.block_q, 2).repeat_interleave(block_map.block_k, 3)
    return keep[:, :, : block_map.reach.queries, : block_map.reach.keys]
