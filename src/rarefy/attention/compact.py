"""A map over a store made one over few tokens: of what is in code, only blocks that somebody reads are decoded."""

from __future__ import annotations

from dataclasses import replace

import torch

from rarefy.attention.block_map import BlockMap
from rarefy.attention.policy import FEW
from rarefy.attention.reach import Reach
from rarefy.attention.source import Plain, Source, Stored


def compact(source: Source, block_map: BlockMap) -> tuple[Source, BlockMap]:
    """The same attention over tensors that hold the listed blocks alone, for few queries over a store; for others what
    was given."""
    reach, size = block_map.reach, block_map.block_k
    if not isinstance(source, Stored) or reach.queries > FEW:
        return source, block_map
    used = block_map.dense().flatten(0, 2).any(0)
    blocks = used.nonzero().flatten()
    if not len(blocks):
        return source, block_map
    ends = torch.cat([(blocks.diff() != 1).nonzero().flatten(), blocks.new_tensor([len(blocks) - 1])])
    begins = torch.cat([blocks.new_zeros(1), ends[:-1] + 1])
    ranges = [
        (low * size, (high + 1) * size)
        for low, high in zip(blocks[begins].tolist(), blocks[ends].tolist(), strict=True)
    ]
    keys, values = (torch.cat([read(*each) for each in ranges], 2) for read in (source.keys, source.values))
    tokens = (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()[: keys.shape[2]]
    # Where a token lies now says nothing of which queries may see it.
    mask = reach.between(0, reach.queries, tokens.expand(1, 1, -1))
    fresh = Reach(reach.queries, keys.shape[2], keys.shape[2] - reach.queries, mask=mask)
    # Between the rows of a map that a kernel made there may be anything.
    given = block_map.columns.long().clamp(0, len(used) - 1)
    columns = (used.cumsum(0) - 1)[given].to(torch.int32)
    return Plain(keys, values), replace(block_map, columns=columns, reach=fresh)
