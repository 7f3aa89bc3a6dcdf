"""Kernels over lists of blocks, interpreted where no GPU is: lists as selectors make them, attention as the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.call import Call
from rarefy.attention.estimators import Antidiagonals, Estimator, Extremes, PooledMeans, true_blocks
from rarefy.attention.estimators.sampled import _folded
from rarefy.attention.executors import Reference, Triton
from rarefy.attention.executors.triton import _pages, unfit
from rarefy.attention.policy import Policy
from rarefy.attention.reach import Reach
from rarefy.attention.selectors import Forced, Mass, Selector, Threshold, TopK
from rarefy.attention.selectors.fused import fused_map
from rarefy.attention.selectors.newest import newest_map
from rarefy.attention.source import Plain, Stored
from rarefy.kv.codecs import Exact
from rarefy.kv.plan import LayerCodecs
from rarefy.kv.store import LayerStore

pytest.importorskip("triton")
from rarefy.kernels.triton import block_attention
from rarefy.kernels.triton.block_decode import BlockDecode
from rarefy.kernels.triton.block_mass import block_mass
from rarefy.kernels.triton.block_select import partial_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_map(reach: Reach, batch: int, heads: int, block_q: int, block_k: int, share: float = 0.4) -> BlockMap:
    blocks = reach.blocks(block_q, block_k, DEVICE)
    keep = torch.rand(batch, heads, blocks.rows, blocks.columns, device=DEVICE) < share
    return BlockMap.from_mask(keep, reach, blocks)


REACHES: dict[str, Any] = {
    "square": lambda: Reach.last(70, 70),
    "chunk": lambda: Reach.last(40, 70),
    "window": lambda: Reach(70, 70, 0, window=20),
    "padded": lambda: Reach(70, 70, 0, first=torch.tensor([0, 19], device=DEVICE)),
    "filled": lambda: Reach(20, 70, 25, stop=torch.tensor([45, 45], device=DEVICE)),
    "both ways": lambda: Reach.last(70, 70, causal=False),
    "packed": lambda: Reach(70, 70, 0, segment=(torch.arange(70, device=DEVICE) // 30).expand(2, -1).contiguous()),
}


@pytest.mark.parametrize("name", REACHES)
def test_attention_over_a_map_is_the_reference(name: str) -> None:
    reach = REACHES[name]()
    query = torch.randn(2, 4, reach.queries, 24, device=DEVICE)
    source = Plain(*(torch.randn(2, 2, reach.keys, 24, device=DEVICE) for _ in range(2)))
    for heads in (4, 2):
        block_map = random_map(reach, 2, heads, 16, 16)
        assert unfit(query, block_map, None) is None
        found, lse = Triton().run(query, source, block_map, 0.3)
        expected, expected_lse = Reference().run(query, source, block_map, 0.3)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse, expected_lse, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("channels", [24, 32])
def test_blocks_that_a_copy_engine_fetches_are_those_that_threads_load(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach = REACHES["padded"]()
    query, key, value = (torch.randn(2, 70, n, channels, device=DEVICE).half().transpose(1, 2) for n in (4, 2, 2))
    block_map = random_map(reach, 2, 4, 16, 16)
    found = []
    for engine in (True, False):
        monkeypatch.setattr(block_attention, "has_engine", lambda device, engine=engine: engine)
        assert (block_attention.described(key, 16) is None) == (not engine)
        found.append(Triton().run(query, Plain(key, value), block_map, 0.3))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(block_attention, "has_engine", lambda device: True)
    # One row of channels in three lies where the engine reads none; of one sequence the stride is nothing.
    apart = torch.randn(1, 2, 70, 20, device=DEVICE).half()[..., :16]
    assert block_attention.described(apart, 16) is None and block_attention.described(key.float(), 16) is None
    assert block_attention.described(key[:1, :1, :, :16], 16) is not None


@pytest.mark.parametrize(("block_q", "block_k"), [(8, 32), (24, 64), (16, 16)])
def test_large_blocks_are_taken_in_parts_and_heads_that_share_a_list_at_once(
    block_q: int, block_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_attention, "KEYS", 16)
    for queries, heads in ((100, 2), (37, 8), (100, 1)):
        reach = Reach.last(queries, 100)
        query = torch.randn(1, 8, queries, 16, device=DEVICE)
        source = Plain(*(torch.randn(1, 2, 100, 16, device=DEVICE) for _ in range(2)))
        block_map = random_map(reach, 1, heads, block_q, block_k)
        for packed in (128, 16):
            monkeypatch.setattr(block_attention, "QUERIES", packed)
            found, lse = Triton().run(query, source, block_map, 0.3)
            expected, expected_lse = Reference().run(query, source, block_map, 0.3)
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(lse, expected_lse, rtol=2e-3, atol=2e-3)


def test_blocks_that_are_not_listed_are_not_read() -> None:
    reach = Reach.last(64, 64)
    keep = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device=DEVICE)
    keep[..., range(4), range(4)] = True
    keep[..., 0] = True
    keep[:, :, 2:, 2] = False
    block_map = BlockMap.from_mask(keep, reach, reach.blocks(16, 16, DEVICE))
    key, value = torch.randn(1, 1, 64, 16, device=DEVICE), torch.randn(1, 1, 64, 16, device=DEVICE)
    query = torch.randn(1, 1, 64, 16, device=DEVICE)
    clean = Triton().run(query, Plain(key, value), block_map, 0.25)
    key[:, :, 32:48], value[:, :, 32:48] = torch.nan, torch.nan
    found = Triton().run(query, Plain(key, value), block_map, 0.25)
    for one, other in zip(clean, found, strict=True):
        torch.testing.assert_close(one, other)
    key[0, 0, 3] = torch.nan  # a key of the first block, which everybody reads
    assert not torch.isfinite(Triton().run(query, Plain(key, value), block_map, 0.25)[0]).all()


SELECTORS: list[Selector] = [
    TopK(0.3), TopK(count=2), TopK(0.2, include_forced=False), Mass(0.7), Mass(1.0), Threshold(0.1), Forced(),
    Threshold(torch.tensor([0.3, 0.0, 0.01])), Threshold(1.5, normalized=False),
]  # fmt: skip


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda each: type(each).__name__)
def test_the_kernel_selects_what_the_selector_does(selector: Selector) -> None:
    reach = Reach(75, 100, 25, first=torch.tensor([0, 40], device=DEVICE))
    blocks = reach.blocks(15, 10, DEVICE)
    scores = torch.randn(2, 3, blocks.rows, blocks.columns, device=DEVICE)
    scores[0, 1, 2, 3:5] = 0.5  # a tie
    scores[1, 0] = 0.0  # all equal
    scores[0, 2, 1, 0] = torch.inf
    forced = torch.rand(1, 1, blocks.rows, blocks.columns, device=DEVICE) < 0.2
    scores[1, 1, :, ::2] = -torch.inf  # nothing known of it, and yet kept where it is forced
    scores[0, 1, 3] = -torch.inf
    rule = selector.rule()
    assert rule is not None
    found = fused_map(rule, scores, blocks, forced & blocks.some, reach)
    keep = selector.select(scores, blocks.some, forced & blocks.some)
    expected = BlockMap.from_mask(keep, reach, blocks)
    assert torch.equal(found.dense(), expected.dense())
    assert torch.equal(found.whole, expected.whole) and torch.equal(found.count, expected.count)
    found.check() if bool((found.count > 0).all()) else None


def test_blocks_that_need_a_mask_are_listed_by_one_kernel() -> None:
    reach = Reach.last(70, 150)
    block_map = random_map(reach, 2, 3, 32, 16, share=0.7)
    found = partial_blocks(block_map.start, block_map.whole, block_map.count, block_map.columns, 2)
    for one, other in zip(found, block_map.partial_lists(2, fill=0), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduce", ["mass", "max"])
def test_block_mass_is_that_of_attention(reduce: Any) -> None:
    first = torch.tensor([0, 21], device=DEVICE)
    reach = Reach(40, 70, 30, first=first)
    query, key = torch.randn(2, 4, 40, 24, device=DEVICE), torch.randn(2, 2, 70, 24, device=DEVICE)
    call = Call(query, Plain(key, key), reach, 0.3)
    found = block_mass(query, key, block_q=16, block_k=16, scaling=0.3, offset=30, first=first, reduce=reduce)
    torch.testing.assert_close(found, true_blocks(call, reach.blocks(16, 16, DEVICE), reduce), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "selector", [TopK(0.3), TopK(count=3), *(TopK(count=n, least=0, include_forced=False) for n in (0, 2))]
)
@pytest.mark.parametrize("estimator", [PooledMeans(), Extremes()])
@pytest.mark.parametrize("padded", [False, True])
def test_one_query_gets_the_map_that_scores_and_selector_make(
    selector: Selector, estimator: Estimator, padded: bool
) -> None:
    first = torch.tensor([0, 21], device=DEVICE) if padded else None
    policy = Policy(dense_below=0, sink=1, local=2)
    # With a block that is not finished, and without; and of more blocks than one program scores.
    for keys, size in ((150, 16), (160, 16), (598, 8)):
        reach = Reach(1, keys, keys - 1, first=first)
        query, key = torch.randn(2, 6, 1, 16, device=DEVICE), torch.randn(2, 2, keys, 16, device=DEVICE)
        call = Call(query, Plain(key, key), reach, 0.3, phase="decode", mask_heads=2)
        products = estimator.products(call, size)
        assert products is not None
        found = newest_map(selector, products, policy, call, size)
        blocks = reach.blocks(1, size, DEVICE)
        forced = policy.forced(reach, blocks, 0, 2, 6)
        scores = estimator.scores(call, blocks)
        expected = BlockMap.from_mask(selector.select(scores, blocks.some, forced), reach, blocks)
        assert torch.equal(found.dense(), expected.dense())
        assert torch.equal(found.whole, expected.whole) and torch.equal(found.count, expected.count)
        found.check()


@pytest.mark.parametrize("group", [1, 3])
def test_decoding_over_chosen_blocks(group: int) -> None:
    query = torch.randn(2, 2 * group, 32, device=DEVICE)
    key, value = (torch.randn(2, 2, 160, 32, device=DEVICE) for _ in range(2))
    length = torch.tensor([150, 97], dtype=torch.int32, device=DEVICE)
    index = torch.full((2, 2, 5), -1, dtype=torch.int32, device=DEVICE)
    index[0, 0, :3] = torch.tensor([0, 2, 4])
    index[0, 1, :5] = torch.tensor([4, 3, 2, 1, 0])
    index[1, :, :2] = torch.tensor([0, 3])
    count = (index >= 0).sum(-1, dtype=torch.int32)
    seen = torch.zeros(2, 2, 160, dtype=torch.bool, device=DEVICE)
    for row in range(2):
        for head in range(2):
            for block in index[row, head, : int(count[row, head])].tolist():
                seen[row, head, block * 32 : block * 32 + 32] = True
    seen &= torch.arange(160, device=DEVICE) < length[:, None, None]
    wide = query.unflatten(1, (2, group))
    scores: Tensor = (wide @ key.mT * 0.2).masked_fill(~seen[:, :, None], -torch.inf)
    for splits in (1, 3):
        decode = BlockDecode(2, 2, 2 * group, 32, 32, device=DEVICE, splits=splits, tile=16)
        for _ in range(2):  # counters of programs are left as they were
            found, lse = decode(query, key, value, index, count, length, 0.2)
            torch.testing.assert_close(found, (scores.softmax(-1) @ value).flatten(1, 2), rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(lse, scores.logsumexp(-1).flatten(1, 2), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("share", "steps"), [(1.0, (150, 70, 1, 1)), (0.4, (150, 70, 1, 1)), (0.5, (222,))])
def test_decoding_reads_a_store_where_its_blocks_lie(share: float, steps: tuple[int, ...]) -> None:
    """Runs of several lengths and a tail, padding on the left, with and without a copy of the past."""
    store = LayerStore(LayerCodecs(Exact(torch.float32, 64), Exact(torch.float32, 64)))
    for count in steps:
        seen = store.append(*(torch.randn(2, 2, count, 32, device=DEVICE) for _ in range(2)))
    source = Stored(seen)
    first = torch.tensor([0, 37], device=DEVICE)
    block_map = random_map(Reach(1, 222, 221, first=first), 2, 2, 1, 32, share)
    query = torch.randn(2, 6, 1, 32, device=DEVICE)
    assert _pages(source, torch.float32) is not None and _pages(source, torch.bfloat16) is None
    found, lse = Triton().run(query, source, block_map, 0.2)
    expected, expected_lse = Reference().run(query, source, block_map, 0.2)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-3, atol=2e-3)
    plain = Plain(source.keys(), source.values())
    torch.testing.assert_close(Triton().run(query, plain, block_map, 0.2)[0], found, rtol=2e-3, atol=2e-3)
    buffer = Plain(*(torch.nn.functional.pad(each, (0, 0, 0, 18)) for each in (plain.key, plain.value)))
    filled = Reach(1, 240, 221, first=first, stop=torch.tensor([222, 222], device=DEVICE))
    other = random_map(filled, 2, 2, 1, 16, share)
    found, _ = Triton().run(query, buffer, other, 0.2)
    torch.testing.assert_close(found, Reference().run(query, buffer, other, 0.2)[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("queries", "offset"), [(96, 0), (40, 57), (70, 26)])
def test_antidiagonals_in_one_kernel(queries: int, offset: int) -> None:
    estimator = Antidiagonals(4)
    first = torch.tensor([0, 21], device=DEVICE)
    reach = Reach(queries, queries + offset, offset, first=first)
    query, key = (torch.randn(2, heads, n, 16, device=DEVICE) for heads, n in ((4, queries), (2, queries + offset)))
    call = Call(query, Plain(key, key), reach, 0.3, mask_heads=4)
    blocks = reach.blocks(16, 32, DEVICE)
    expected = Antidiagonals.scores(estimator, call, blocks) if not query.is_cuda else None
    found = estimator.fused(call, blocks, _folded(query, 16, 4, True), _folded(key, 32, 4))
    assert found.shape == (2, 4, blocks.rows, blocks.columns)
    if expected is not None:
        torch.testing.assert_close(found, expected.exp(), rtol=2e-3, atol=2e-3)
