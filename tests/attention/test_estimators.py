"""Estimators against their definitions, what they keep of old keys against what all keys at once would give, and the
rules of selectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.estimators import (
    Antidiagonals,
    Estimator,
    Even,
    Extremes,
    Lines,
    Nearness,
    Noise,
    PooledMeans,
    TrueMass,
    true_blocks,
)  # fmt: skip
from rarefy.attention.plan import AttentionPlan
from rarefy.attention.policy import Policy
from rarefy.attention.pooling import highest, lowest, mean, pooled, similarity
from rarefy.attention.reach import Reach
from rarefy.attention.selectors import Forced, Mass, Threshold, TopK
from rarefy.attention.source import Plain, Stored
from rarefy.core.errors import UnsupportedError
from rarefy.kv.codecs import Exact
from rarefy.kv.plan import LayerCodecs
from rarefy.kv.rotary import Rotary, unrotate
from rarefy.kv.store import LayerStore
from tests.attention.maps import REACHES, tensors, token_mask

BLOCK_Q, BLOCK_K = 8, 16


def call_of(reach: Reach, mask_heads: int = 4, **changes: Any) -> Call:
    query, key, value = tensors(reach)
    return Call(query, Plain(key, value), reach, 0.3, mask_heads=mask_heads, **changes)


def shares_of(call: Call) -> Tensor:
    """Attention probabilities ``[B, H, queries, keys]``, 0 where a query sees nothing."""
    key = call.source.keys().repeat_interleave(call.group, 1)
    scores = call.query @ key.mT * call.scaling
    return scores.masked_fill(~token_mask(call.reach, 2, 4), -torch.inf).softmax(-1).nan_to_num()


@pytest.mark.parametrize("name", REACHES)
def test_true_blocks_are_those_of_the_whole_map(name: str) -> None:
    call = call_of(REACHES[name]())
    blocks = call.reach.blocks(BLOCK_Q, BLOCK_K)
    shares = shares_of(call)
    mass, most = (true_blocks(call, blocks, reduce) for reduce in ("mass", "max"))  # type: ignore[arg-type]
    for i in range(blocks.rows):
        for j in range(blocks.columns):
            tile = shares[:, :, i * BLOCK_Q : (i + 1) * BLOCK_Q, j * BLOCK_K : (j + 1) * BLOCK_K].flatten(2)
            torch.testing.assert_close(mass[..., i, j], tile.sum(2), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(most[..., i, j], tile.amax(2), rtol=1e-4, atol=1e-5)


def test_true_mass_is_joined_over_the_heads_of_a_group() -> None:
    call = call_of(Reach.last(40, 70), mask_heads=2)
    blocks = call.reach.blocks(BLOCK_Q, BLOCK_K)
    mass = true_blocks(call, blocks)
    torch.testing.assert_close(TrueMass().scores(call, blocks).exp(), mass.unflatten(1, (2, 2)).sum(2))
    most = true_blocks(call, blocks, "max").unflatten(1, (2, 2)).amax(2)
    torch.testing.assert_close(TrueMass("max").scores(call, blocks).exp(), most)


@pytest.mark.parametrize("name", ["square", "chunk", "one query", "left padding"])
def test_means_are_those_of_tokens_that_count(name: str) -> None:
    call = call_of(REACHES[name]())
    block_q = min(BLOCK_Q, call.reach.queries)
    blocks = call.reach.blocks(block_q, BLOCK_K)
    found = PooledMeans().scores(call, blocks)
    valid = torch.ones(2, call.reach.keys, dtype=torch.bool) if call.valid is None else call.valid
    for i in range(blocks.rows):
        query = call.query[:, :, i * block_q : (i + 1) * block_q].mean(2)
        for j in range(blocks.columns):
            part = slice(j * BLOCK_K, (j + 1) * BLOCK_K)
            counts = valid[:, None, part, None]
            key = (call.source.keys()[:, :, part] * counts).sum(2) / counts.sum(2).clamp(min=1)
            expected = (query * key.repeat_interleave(2, 1)).sum(-1) * 0.3
            torch.testing.assert_close(found[..., i, j], expected, rtol=1e-4, atol=1e-5)


def test_a_mean_that_is_like_nothing_is_not_believed() -> None:
    reach = Reach.last(64, 64)
    query, key, value = tensors(reach, 1)
    key[:, :, 16:32] = torch.randn(8) + 0.01 * torch.randn(1, 2, 16, 8)  # alike
    query[:, :, 8:16] = torch.randn(8)
    call = Call(query, Plain(key, value), reach, 0.3, mask_heads=4)
    scores = PooledMeans(likeness=0.9).scores(call, reach.blocks(BLOCK_Q, BLOCK_K))
    believed = scores < torch.inf
    assert bool(believed[:, :, 1, 1].all()) and int(believed.sum()) == 4
    x = torch.randn(1, 1, 2, 5, 4)
    unit = torch.nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(similarity(x, None), (unit @ unit.mT).mean((3, 4))[..., None])
    counts = torch.tensor([True, True, True, False, False])[None, None, None, :, None]
    few = unit[:, :, :, :3]
    torch.testing.assert_close(similarity(x, counts), (few @ few.mT).mean((3, 4))[..., None])
    assert not torch.isnan(similarity(torch.zeros(1, 1, 1, 3, 4), None)).any()


@pytest.mark.parametrize("name", ["square", "chunk", "one query", "left padding"])
def test_no_key_exceeds_the_bound_of_its_block(name: str) -> None:
    call = call_of(REACHES[name](), mask_heads=2)
    blocks = call.reach.blocks(min(BLOCK_Q, call.reach.queries), BLOCK_K)
    bound = Extremes().scores(call, blocks)
    products = call.query @ call.source.keys().repeat_interleave(2, 1).mT * 0.3
    products = products.masked_fill(~token_mask(call.reach, 2, 4), -torch.inf)
    for i in range(blocks.rows):
        for j in range(blocks.columns):
            rows = slice(i * blocks.block_q, (i + 1) * blocks.block_q)
            best = products[:, :, rows, j * BLOCK_K : (j + 1) * BLOCK_K].amax((2, 3)).unflatten(1, (2, 2)).amax(2)
            assert bool((best <= bound[..., i, j] + 1e-5).all())
    one = torch.randn(1, 2, 16, 8)
    alike = Plain(one[:, :, :1].expand_as(one), one)
    exact = Call(torch.randn(1, 4, 1, 8), alike, Reach.last(1, 16), 0.3, mask_heads=4)
    torch.testing.assert_close(
        Extremes().scores(exact, exact.reach.blocks(1, 16)), TrueMass().scores(exact, exact.reach.blocks(1, 16)) +
        (exact.query @ exact.source.keys().repeat_interleave(2, 1).mT * 0.3)[..., :1],
    )  # fmt: skip


def test_antidiagonals_are_summed_tile_by_tile() -> None:
    stride, reach = 4, Reach.last(40, 64)
    call = call_of(reach)
    blocks = reach.blocks(BLOCK_Q, BLOCK_K)
    found = Antidiagonals(stride).scores(call, blocks).exp()
    products = call.query @ call.source.keys().repeat_interleave(2, 1).mT * 0.3
    tiles = torch.full((2, 4, 10, 16), -torch.inf)
    for i in range(10):
        for j in range(16):
            if j * stride <= i * stride + stride - 1 + reach.offset:
                cells = [products[:, :, i * stride + stride - 1 - n, j * stride + n] for n in range(stride)]
                tiles[:, :, i, j] = torch.stack(cells).sum(0) / stride
    expected = tiles.softmax(-1).unflatten(3, (4, 4)).unflatten(2, (5, 2)).sum((3, 5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedError, match="stride of 3 does not divide blocks of 8 by 16"):
        Antidiagonals(3).scores(call, blocks)


def test_lines_are_found_where_they_are() -> None:
    """A column that all queries look at and a diagonal at a distance of 37, in heads of their own."""
    tokens, reach = 128, Reach.last(128, 128)
    key = torch.eye(tokens)[None, None].repeat(1, 2, 1, 1) * 20
    query = torch.zeros(1, 2, tokens, tokens)
    query[:, 0, :, 50] = 1.0
    query[0, 1, range(37, tokens), range(tokens - 37)] = 1.0
    call = Call(query, Plain(key, key), reach, 1.0, mask_heads=2)
    blocks = reach.blocks(16, 16)
    kept = Lines(1, 1, sink=0, near=0).scores(call, blocks) == torch.inf
    assert bool(kept[0, 0, 4:, 3].all())
    place = torch.arange(8)
    crossed = (place[:, None] * 16 + 15 - 37 >= place * 16) & (place[:, None] * 16 - 37 <= place * 16 + 15)
    assert bool((kept[0, 1] | ~crossed).all())
    forced = Lines(4, 4, sink=4, near=4).scores(call, blocks) == torch.inf
    assert bool(forced[:, :, :, 0].all()) and bool(forced[:, :, place, place].all())


ALL: list[Estimator] = [
    Even(), Nearness(), Noise(3), TrueMass(), PooledMeans(), PooledMeans(0.1), Extremes(), Antidiagonals(4),
    Lines(5, 5),
]  # fmt: skip


@pytest.mark.parametrize("estimator", ALL, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("name", [name for name in REACHES if name != "one query"])
def test_scores_have_the_shape_of_blocks_and_are_numbers_in_reach(name: str, estimator: Estimator) -> None:
    for mask_heads in (4, 2):
        call = call_of(REACHES[name](), mask_heads)
        blocks = call.reach.blocks(BLOCK_Q, BLOCK_K)
        scores = estimator.scores(call, blocks)
        assert scores.shape == (2, mask_heads, blocks.rows, blocks.columns) and scores.dtype == torch.float32
        assert not torch.isnan(scores).any()


SUMMARIES = {
    "means": (lambda x, counts, begins: {"mean": mean(x, counts)}, 8, None),
    "extremes": (lambda x, counts, begins: {"high": highest(x, counts), "low": lowest(x, counts)}, 8, None),
    "overlapping": (lambda x, counts, begins: {"mean": mean(x, counts)}, 4, 8),
    "beginnings": (lambda x, counts, begins: {"begin": x[:, :, :, 0] * 0 + torch.tensor(begins)[:, None]}, 8, None),
}  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SUMMARIES)
def test_what_is_kept_is_what_all_keys_at_once_give(name: str, padded: bool) -> None:
    make, tokens, span = SUMMARIES[name]
    key, value = torch.randn(2, 2, 60, 8), torch.randn(2, 2, 60, 8)
    valid = torch.arange(60) >= torch.tensor([[0], [13]]) if padded else None
    store = LayerStore(LayerCodecs(Exact(torch.float32, 8), Exact(torch.float32, 8)))
    done = 0
    for count in (30, 1, 1, 9, 19):
        seen = store.append(key[:, :, done : done + count], value[:, :, done : done + count])
        done += count
        now = None if valid is None else valid[:, :done]
        grown = pooled(Stored(seen), "own", tokens, make, span=span, valid=now)
        fresh = pooled(Plain(key[:, :, :done], value[:, :, :done]), "own", tokens, make, span=span, valid=now)
        for label, tensor in fresh.items():
            assert tensor.shape[2] == -(-done // tokens)
            torch.testing.assert_close(grown[label], tensor)
        whole = pooled(Stored(seen), "own", tokens, make, span=span, valid=now, unfinished=False)
        assert all(tensor.shape[2] == max(0, (done - (span or tokens)) // tokens + 1) for tensor in whole.values())
    store.crop(60 - 29)
    seen = store.append(key[:, :, 29:50], value[:, :, 29:50])
    now = None if valid is None else valid[:, :50]
    grown = pooled(Stored(seen), "own", tokens, make, span=span, valid=now)
    for label, tensor in pooled(Plain(key[:, :, :50], value), "own", tokens, make, span=span, valid=now).items():
        torch.testing.assert_close(grown[label], tensor)


def test_rotary_embedding_can_be_undone() -> None:
    rotary = Rotary(1e4 ** (-torch.arange(4) / 4))
    positions = torch.arange(30, 40)[None]
    query, key = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 40, 8)
    turned = rotary.rotate(query, positions)
    source = Plain(rotary.rotate(key, torch.arange(40)[None]), key)
    given = {"angles": rotary.angles(positions), "positions": positions, "find_rotary": lambda: rotary}
    call = Call(turned, source, Reach.last(10, 40), 0.3, **given)
    torch.testing.assert_close(call.query_before_rope(), query, rtol=1e-4, atol=1e-5)
    for start in (32, 16):  # new ones, and others of earlier passes
        cos, sin = call.key_angles(torch.arange(start, 40))
        before = unrotate(source.keys(start, 40), cos[:, None], sin[:, None])
        torch.testing.assert_close(before, key[:, :, start:], rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedError, match="can be computed anew"):
        replace(call, find_rotary=None).key_angles(torch.arange(16, 40))
    with pytest.raises(UnsupportedError, match="does not tell its rotary embedding"):
        call_of(Reach.last(10, 40)).query_before_rope()


@pytest.mark.parametrize(
    "positions",
    [
        [*([1] * 5), *range(35)],  # padded on the left, as generate() counts
        [*range(25), *range(15)],  # two sequences in a row
        [*range(7, 47)],  # begun elsewhere
    ],
)
def test_rotary_embedding_is_undone_by_the_positions_that_tokens_had(positions: list[int]) -> None:
    rotary, places = Rotary(1e4 ** (-torch.arange(4) / 4)), torch.tensor(positions)[None]
    query, key = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
    source = Plain(rotary.rotate(key, places), key)
    given = {"angles": rotary.angles(places), "positions": places, "find_rotary": lambda: rotary}
    call = Call(rotary.rotate(query, places), source, Reach.last(40, 40), 0.3, **given)
    torch.testing.assert_close(call.query_before_rope(), query, rtol=1e-4, atol=1e-5)
    found = unrotate(source.keys(), *(part[:, None] for part in call.key_angles(torch.arange(40))))
    torch.testing.assert_close(found, key, rtol=1e-4, atol=1e-5)
    last = replace(call, query=call.query[:, :, -1:], positions=places[:, -1:], reach=Reach.last(1, 40))
    found = unrotate(source.keys(25), *(part[:, None] for part in last.key_angles(torch.arange(25, 40))))
    torch.testing.assert_close(found, key[:, :, 25:], rtol=1e-4, atol=1e-5)
    cos, _ = call.angles_of_blocks(range(32, 48, 16))  # a block that is not whole yet
    torch.testing.assert_close(cos[:, :8], rotary.angles(places[:, 32:])[0])


def rows_of(keep: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in keep[0, 0]]


SCORES = torch.tensor([[[[0.3, 0.1, 0.4, 0.2, 0.9], [2.0, 2.0, 2.0, 2.0, 2.0], [5.0, 1.0, 1.0, 4.0, 0.0]]]])
SOME = torch.tensor([[[[True, True, True, True, False], [True] * 5, [True] * 5]]])
FORCED = torch.tensor([[[[False, True, False, False, False], [False] * 4 + [True], [False] * 5]]])


def test_the_best_are_kept_and_the_first_of_equals() -> None:
    assert rows_of(TopK(0.5).select(SCORES, SOME, FORCED)) == [[1, 2], [0, 1, 4], [0, 1, 3]]
    assert rows_of(TopK(0.5, include_forced=False).select(SCORES, SOME, FORCED)) == [[0, 1, 2], [0, 1, 2, 4], [0, 1, 3]]
    assert rows_of(TopK(count=1).select(SCORES, SOME, FORCED)) == [[1], [4], [0]]
    assert rows_of(TopK(0.01, least=2).select(SCORES, SOME, FORCED)) == [[1, 2], [0, 4], [0, 3]]
    assert rows_of(TopK(1.0).select(SCORES, SOME, FORCED)) == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_mass_is_reached_with_the_fewest_blocks() -> None:
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(1, 1, 1, 4)
    some, none = torch.ones(1, 1, 1, 4, dtype=torch.bool), torch.zeros(1, 1, 1, 4, dtype=torch.bool)
    forced = none.clone()
    forced[..., 3] = True
    for mass, kept in ((0.39, [0]), (0.41, [0, 1]), (0.69, [0, 1]), (0.71, [0, 1, 2]), (0.95, [0, 1, 2, 3])):
        assert rows_of(Mass(mass).select(scores, some, none)) == [kept]
    assert rows_of(Mass(0.45).select(scores, some, forced)) == [[0, 3]]  # what is forced counts
    always = scores.clone()
    always[..., 2] = torch.inf
    assert rows_of(Mass(0.45).select(always, some, none)) == [[0, 2]]  # and is not among the shares if infinite


def test_thresholds_are_of_shares_or_of_scores() -> None:
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.7, 0.2, 0.06, 0.04]]).log().view(1, 2, 1, 4)
    some, none = torch.ones(1, 1, 1, 4, dtype=torch.bool), torch.zeros(1, 1, 1, 4, dtype=torch.bool)
    kept = Threshold(torch.tensor([0.25, 0.05])).select(scores + 3.0, some, none)
    assert kept[0, 0, 0].tolist() == [True, True, False, False] and kept[0, 1, 0].tolist() == [True, True, True, False]
    assert Threshold(0.25, normalized=False).select(scores, some, none)[0, 1, 0].tolist() == [True, False, False, False]
    assert bool(Threshold(0.0).select(scores, some, none).all())
    assert rows_of(Forced().select(scores, some, some & (torch.arange(4) == 2))) == [[2]]


def test_the_last_block_and_the_first_are_kept_for_every_query() -> None:
    for name in REACHES:
        call = call_of(REACHES[name]())
        plan = AttentionPlan(Noise(), TopK(0.05), Policy(dense_below=0, max_density=1), BLOCK_Q, BLOCK_K)
        found = plan.map(call)
        assert found is not None
        if call.reach.mask is None:
            found.check()
        keep, blocks = found.dense(), call.reach.blocks(min(BLOCK_Q, call.reach.queries), BLOCK_K)
        if call.reach.causal and call.reach.mask is None:
            for i in range(blocks.rows):
                own = (i * blocks.block_q + call.reach.offset) // BLOCK_K
                assert torch.equal(keep[..., i, own], blocks.some.expand_as(keep)[..., i, own])
