"""What may be seen, in tokens and in blocks, and maps of blocks: sound, and refused where they are not."""

from __future__ import annotations

import pytest
import torch

from rarefy.attention.block_map import BlockMap
from rarefy.attention.reach import Reach
from rarefy.core.errors import FormatError
from tests.attention.maps import REACHES, random_map, token_mask


@pytest.mark.parametrize("name", REACHES)
def test_a_reach_is_the_mask_that_it_stands_for(name: str) -> None:
    reach = REACHES[name]()
    seen = token_mask(reach, 2, 1)
    place = torch.arange(reach.keys)
    assert torch.equal(reach.between(0, reach.queries, place.expand(2, 1, -1)), seen)
    some = torch.tensor([[[3, -1, 5, reach.keys - 1]]])
    picked = reach.between(0, reach.queries, some).expand(2, -1, -1, -1)
    assert torch.equal(picked, seen[..., some[0, 0]] & (some >= 0))


@pytest.mark.parametrize("sizes", [(16, 16), (16, 32), (40, 16), (1, 16), (7, 9)])
@pytest.mark.parametrize("name", REACHES)
def test_blocks_of_a_reach_are_those_of_its_mask(name: str, sizes: tuple[int, int]) -> None:
    reach, (block_q, block_k) = REACHES[name](), sizes
    blocks = reach.blocks(block_q, block_k)
    seen = token_mask(reach, 2, 1)
    for i in range(blocks.rows):
        for j in range(blocks.columns):
            tile = seen[:, :, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            whole = tile.flatten(2).all(2) & ((j + 1) * block_k <= reach.keys)
            assert torch.equal(blocks.some[..., i, j].expand(2, 1), tile.flatten(2).any(2)), (i, j)
            assert torch.equal(blocks.full[..., i, j].expand(2, 1), whole), (i, j)


@pytest.mark.parametrize("name", REACHES)
def test_a_map_lists_what_was_kept(name: str) -> None:
    reach = REACHES[name]()
    blocks = reach.blocks(16, 16)
    keep = torch.rand(2, 3, blocks.rows, blocks.columns) < 0.5
    block_map = BlockMap.from_mask(keep, reach, blocks)
    kept = keep & blocks.some
    assert torch.equal(block_map.dense(), kept)
    assert torch.equal(block_map.whole, (kept & blocks.full).sum(-1).int())
    assert block_map.columns.numel() == int(kept.sum()) == int(block_map.kept().sum())
    visible = blocks.some.expand(2, 3, -1, -1).sum((0, 2, 3))
    torch.testing.assert_close(block_map.density(), kept.sum((0, 2, 3)) / visible)
    partial, listed = block_map.partial_lists()
    assert torch.equal(partial, (kept & ~blocks.full).sum(-1).int())
    for row in (kept & ~blocks.full).nonzero():
        b, m, i, j = row.tolist()
        assert j in listed[b, m, i].tolist()
    wide = block_map.per_head(6)
    assert torch.equal(wide.dense(), kept.repeat_interleave(2, 1))


def test_lists_in_any_order_make_a_map() -> None:
    reach = Reach.last(64, 64)
    lists = torch.tensor([[[[0, -1, -1, -1], [1, 0, -1, -1], [2, -1, 0, -1], [3, 1, 2, 0]]]])
    block_map = BlockMap.from_lists(lists, reach, 16, 16)
    block_map.check()
    assert block_map.lists()[0, 0].tolist() == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 2, -1, -1], [0, 1, 2, 3]]
    assert block_map.count[0, 0].tolist() == [1, 2, 2, 4] and block_map.whole[0, 0].tolist() == [0, 1, 1, 3]


@pytest.mark.parametrize(
    ("lists", "sentence"),
    [
        ([[0, 0], [0, 1]], "named twice in one row"),
        ([[0, -1], [1, 2]], "Key block 2 is beyond the 2 of 32 keys"),
        ([[0, -1]], "Lists of 1 query blocks do not fit 2 of 32 queries"),
    ],
)
def test_lists_that_cannot_be_are_refused(lists: list[list[int]], sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence):
        BlockMap.from_lists(torch.tensor(lists)[None, None], Reach.last(64, 64), 32, 32)


def test_a_row_without_a_block_is_found() -> None:
    reach = Reach.last(64, 64)
    blocks = reach.blocks(16, 16)
    keep = blocks.some.clone()
    keep[0, 0, 2] = False
    with pytest.raises(FormatError, match="Query block 2 of head 0 in row 0 reads no block"):
        BlockMap.from_mask(keep, reach, blocks).check()
    padded = Reach(64, 64, 0, first=torch.tensor([40]))  # the first two blocks of queries see nothing anyway
    blocks = padded.blocks(16, 16)
    BlockMap.from_mask(blocks.some, padded, blocks).check()


def test_columns_out_of_order_are_found() -> None:
    block_map = random_map(Reach.last(64, 64), 1, 1, share=1.0)
    broken = BlockMap(
        16, 16, block_map.start, block_map.whole, block_map.count, block_map.columns.flip(0), block_map.reach
    )
    with pytest.raises(FormatError, match="must rise within a row"):
        broken.check()


def test_a_padded_map_is_the_list_of_one_block_of_queries() -> None:
    block_map = random_map(Reach.last(5, 64), 2, 2, 5, 16)
    padded, lists = block_map.newest(), block_map.lists()
    assert padded.index.shape == (2, 2, 4) and padded.block_k == 16
    assert torch.equal(padded.count, block_map.count[:, :, 0])
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        size = int(padded.count[row, head])
        assert torch.equal(padded.index[row, head, :size], lists[row, head, 0, :size])
    with pytest.raises(FormatError, match="has one block of queries, this map has 4"):
        random_map(Reach.last(64, 64), 1, 1).newest()


@pytest.mark.parametrize("name", REACHES)
@pytest.mark.parametrize("sizes", [(16, 16), (8, 32), (5, 7)])
def test_what_is_visible_is_counted_without_looking(name: str, sizes: tuple[int, int]) -> None:
    reach = REACHES[name]()
    assert float(reach.visible(*sizes, torch.device("cpu"))) == float(reach.blocks(*sizes).some.sum())
    own = reach.stop if reach.stop is not None else torch.full((2,), reach.keys)
    last = reach.offset + reach.queries if reach.causal else reach.keys
    assert reach.ends(2, torch.device("cpu")).tolist() == own.clamp(max=last).tolist()[:2] or reach.mask is not None
