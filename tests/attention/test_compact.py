"""Maps over a store made maps over few tokens, also those of kernels, which leave anything between their rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from rarefy.attention.block_map import BlockMap
from rarefy.attention.executors import Reference
from rarefy.attention.reach import Reach
from rarefy.attention.source import Plain, Stored
from rarefy.kv.attend import plain_store
from tests.attention.maps import tensors


def test_what_lies_between_rows_is_not_read() -> None:
    reach = Reach.last(1, 70)
    query, key, value = tensors(reach)
    blocks = reach.blocks(1, 8)
    dense = BlockMap.from_mask(torch.rand(2, 2, 1, blocks.columns) < 0.4, reach, blocks)
    width = blocks.columns + 3
    columns = torch.full((dense.count.numel(), width), 10**6, dtype=torch.int32)
    for row, (start, count) in enumerate(zip(dense.start.flatten(), dense.count.flatten(), strict=True)):
        columns[row, :count] = dense.columns[start : start + count]
    start = (torch.arange(dense.count.numel(), dtype=torch.int32) * width).reshape(dense.count.shape)
    spread = replace(dense, start=start, columns=columns.flatten())
    expected, _ = Reference().run(query, Plain(key, value), dense, 0.3)
    found, _ = Reference().run(query, Stored(plain_store(key, value)), spread, 0.3)
    assert torch.allclose(found, expected, atol=1e-6)
