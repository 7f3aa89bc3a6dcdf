"""Attention over listed blocks by every instruction set of the native library, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rarefy.attention.executors import Native
from rarefy.attention.reach import Reach
from rarefy.attention.source import Plain
from rarefy.core.errors import FormatError
from rarefy.kernels.cpu import library
from rarefy.kernels.cpu.blocks import attend_blocks
from tests.attention.maps import oracle, random_map, tensors, token_mask, tokens_of

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library was not built")


@pytest.mark.parametrize("instructions", library.supported() if library.available() else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("queries", "keys", "block_q", "block_k", "channels"),
    [(70, 70, 64, 32, 128), (150, 200, 48, 24, 64), (33, 300, 128, 128, 48), (65, 90, 17, 7, 16)],
)
def test_it_is_attention_over_the_listed_blocks(
    queries: int, keys: int, block_q: int, block_k: int, channels: int, dtype: torch.dtype, instructions: str
) -> None:
    """Strides of a model, blocks that are no multiple of a panel, rows and lists of every length."""
    reach = Reach(queries, keys, keys - queries, first=torch.tensor([0, 19]))
    query, key, value = (part.to(dtype) for part in tensors(reach, 2, 4, 2, channels))
    query, key, value = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key, value))
    for lists in (4, 2, 1):
        block_map = random_map(reach, 2, lists, block_q, block_k)
        with library.using(instructions):
            found, lse = Native().run(query, Plain(key, value), block_map, 0.2)
        seen = token_mask(reach, 2, 4) & tokens_of(block_map, 4)
        expected, expected_lse = oracle(query, key, value, seen, 0.2)
        exact = dtype == torch.float32
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=1e-4 if exact else 2e-2, atol=1e-5 if exact else 2e-2)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


def test_sums_of_far_and_near_scores_hold() -> None:
    """The largest score comes last, and what came before it fades to nothing; or all are far below zero."""
    reach = Reach.last(40, 200)
    query, key, value = tensors(reach, 1, 2, 1, 32)
    block_map = random_map(reach, 1, 2, 16, 16, share=1.0)
    seen = token_mask(reach, 1, 2)
    for factor in (torch.linspace(0.1, 40, 200), torch.linspace(40, 0.1, 200)):
        found, lse = Native().run(query, Plain(key * factor[:, None], value), block_map, 0.5)
        expected, expected_lse = oracle(query, key * factor[:, None], value, seen, 0.5)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-3)


def test_lists_and_sizes_are_looked_at() -> None:
    query, key = torch.randn(1, 2, 32, 16), torch.randn(1, 1, 64, 16)
    start, count = (torch.zeros(1, 2, 2, dtype=torch.int32) for _ in range(2))
    low, high = (torch.zeros(1, 32, dtype=torch.int32) for _ in range(2))
    columns = torch.tensor([3, 1], dtype=torch.int32)
    options: dict[str, Any] = {"block_q": 16, "block_k": 16, "scaling": 0.1}
    out, lse = attend_blocks(query, key, key, start, count, columns, low, high, **options)
    assert not out.any() and bool(lse.isneginf().all())
    with pytest.raises(FormatError, match="A list names a block that does not exist"):
        attend_blocks(query, key, key, start, count + 2, columns + 1, low, high, **options)
    with pytest.raises(FormatError, match="A list lies beyond what lists there are"):
        attend_blocks(query, key, key, start + 1, count + 2, columns, low, high, **options)
    with pytest.raises(FormatError, match="A query sees keys that do not exist"):
        attend_blocks(query, key, key, start, count, columns, low, high + 65, **options)
    with pytest.raises(FormatError, match="is given tensors of shapes"):
        attend_blocks(query, key, key, start[:, :, :1], count, columns, low, high, **options)
    with pytest.raises(FormatError, match="does not take 24 channels"):
        attend_blocks(*(torch.randn(1, 2, 32, 24) for _ in range(3)), start, count, columns, low, high, **options)
