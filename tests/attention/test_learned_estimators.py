"""Gates, windows and low-bit products: each against the sum or softmax that its paper writes down, one number at a
time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.estimators import Antidiagonals, Extremes, PooledMeans, TrueMass
from rarefy.attention.estimators.gated import Gated
from rarefy.attention.estimators.low_bit import LowBitProducts, anchored_scores, coarse_codes
from rarefy.attention.estimators.windowed import WindowMeans, window_shares, windows_to_blocks
from rarefy.attention.gate import BlockGate
from rarefy.attention.reach import Reach
from rarefy.attention.selectors import TopK
from rarefy.attention.source import Plain
from rarefy.attention.thresholds import largest_within
from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.kv.rotary import Rotary
from tests.attention.maps import tensors, token_mask

ROTARY = Rotary(torch.tensor([1.0, 0.3, 0.1, 0.01]))
POOLS = ("max", "min", "mean")


def call_of(before_query: Tensor, before_key: Tensor, value: Tensor, shift: int = 0) -> Call:
    """The call of these queries (the newest) and keys, given as they are before rotary embedding."""
    queries, keys = before_query.shape[2], before_key.shape[2]
    places = torch.arange(keys)[None] + shift
    new = places[:, keys - queries :]
    query, key = ROTARY.rotate(before_query, new), ROTARY.rotate(before_key, places)
    reach = Reach.last(queries, keys)
    return Call(
        query, Plain(key, value), reach, 0.3, angles=ROTARY.angles(new), positions=new, find_rotary=lambda: ROTARY
    )


def gate(heads: int, maps: int, normed: bool) -> BlockGate:
    """A gate with random weights."""
    new = BlockGate.new(heads, maps, 8, POOLS, normed)
    drawn = {name: torch.randn(tensor.shape) / 3 for name, tensor in new.tensors("gate").items()}
    return BlockGate.of(drawn, "gate", POOLS)


@pytest.mark.parametrize(("maps", "queries", "keys"), [(4, 70, 70), (2, 40, 70), (4, 64, 64)])
def test_a_gate_scores_pooled_blocks_before_rotary_embedding(maps: int, queries: int, keys: int) -> None:
    query, key, value = tensors(Reach.last(queries, keys))
    own, call = gate(4, maps, False), replace(call_of(query, key, value), mask_heads=maps)
    found = Gated({"prefill": own}).scores(call, call.reach.blocks(16, 16))
    for i in range(found.shape[2]):
        asked = query[:, :, i * 16 : (i + 1) * 16].mean(2)
        for j in range(found.shape[3]):
            block = key[:, :, j * 16 : (j + 1) * 16]
            summary = torch.cat([block.amax(2), block.amin(2), block.mean(2)], -1)
            for m in range(maps):
                k = summary[:, m * 2 // maps] @ own.keys[m]
                if own.queries is None:
                    q = asked[:, m]
                else:
                    q = sum(asked[:, 2 * m + g] @ own.queries[m, g] for g in range(2))
                q, k = (
                    ROTARY.rotate(part[:, None, None], torch.tensor([[place]]))[:, 0, 0]
                    for part, place in ((q, keys - queries + i * 16), (k, j * 16))
                )
                assert torch.allclose(found[:, m, i, j], (q * k).sum(-1) / math.sqrt(8), atol=1e-4)


@pytest.mark.parametrize("pools", [("mean",), POOLS, ("max", "min")])
def test_a_new_gate_is_a_product_of_means(pools: tuple) -> None:
    query, key, value = tensors(Reach.last(32, 32))
    call = replace(call_of(query, key, value), mask_heads=4)
    found = Gated({"prefill": BlockGate.new(4, 4, 8, pools, False)}).scores(call, call.reach.blocks(16, 16))
    blocks = key.unflatten(2, (2, 16))
    middle = blocks.mean(3) if "mean" in pools else (blocks.amax(3) + blocks.amin(3)) / 2
    for i in range(2):
        for j in range(2):
            q = ROTARY.rotate(query[:, :, i * 16 : i * 16 + 16].mean(2, keepdim=True), torch.tensor([[i * 16]]))
            k = ROTARY.rotate(middle[:, :, j : j + 1], torch.tensor([[j * 16]])).repeat_interleave(2, 1)
            assert torch.allclose(found[:, :, i, j], 0.5 * (q * k).sum((2, 3)) / math.sqrt(8), atol=1e-4)


def test_a_gate_depends_on_distance_alone_and_not_on_where_a_row_begins() -> None:
    query, key, value = tensors(Reach.last(32, 64))
    estimator = Gated({"prefill": gate(4, 4, False)})
    scores = []
    for shift in (0, 1000):
        call = replace(call_of(query, key, value, shift), mask_heads=4)
        scores.append(estimator.scores(call, call.reach.blocks(16, 16)))
    assert torch.allclose(*scores, atol=1e-3)


def test_what_a_gate_keeps_of_keys_is_the_same_however_they_came() -> None:
    query, key, value = tensors(Reach.last(70, 70))
    estimator = Gated({"prefill": gate(4, 4, False), "decode": gate(4, 2, True)})
    whole = replace(call_of(query[:, :, -1:], key, value), mask_heads=2, phase="decode")
    expected = estimator.scores(whole, whole.reach.blocks(1, 16))
    state: dict[str, object] = {}
    for stop in (40, 69, 70):  # a dense prompt, a dense step, a step that is scored
        part = call_of(query[:, :, stop - 1 : stop], key[:, :, :stop], value[:, :, :stop])
        part = replace(part, mask_heads=2, phase="decode", source=Plain(part.source.keys(), value[:, :, :stop], state))
        if stop < 70:
            estimator.observe(part, 16)
    found = estimator.scores(part, part.reach.blocks(1, 16))
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_gate_serves_blocks_of_two_sizes_over_the_same_keys() -> None:
    query, key, value = tensors(Reach.last(64, 64))
    estimator, call = Gated({"prefill": gate(4, 4, False)}), replace(call_of(query, key, value), mask_heads=4)
    for block in (16, 32):
        fresh = replace(call, source=Plain(call.source.keys(), value))
        expected = estimator.scores(fresh, call.reach.blocks(block, block))
        assert torch.equal(estimator.scores(call, call.reach.blocks(block, block)), expected)


def test_a_gate_that_is_missing_and_an_unknown_embedding_are_named() -> None:
    query, key, value = tensors(Reach.last(32, 32))
    call = replace(call_of(query, key, value), mask_heads=4)
    with pytest.raises(OptionError, match="no trained gate for prefill"):
        Gated({"decode": gate(4, 2, True)}).scores(call, call.reach.blocks(16, 16))
    for unknown in (replace(call, find_rotary=None), replace(call, find_rotary=lambda: None)):
        with pytest.raises(UnsupportedError, match="rotary embedding"):
            Gated({"prefill": gate(4, 4, False)}).scores(unknown, call.reach.blocks(16, 16))


@pytest.mark.parametrize(("block", "size", "stride"), [(64, 32, 16), (8, 4, 2), (8, 8, 8), (16, 4, 4)])
def test_a_block_gets_the_most_of_the_windows_that_touch_it(block: int, size: int, stride: int) -> None:
    for windows in (0, 1, 5, 11):
        shares = torch.rand(windows)
        found = windows_to_blocks(shares, 4, block, size, stride)
        for j in range(4):
            touching = [
                float(shares[i])
                for i in range(windows)
                if stride * i < block * (j + 1) and stride * i + size > block * j
            ]
            assert float(found[j]) == pytest.approx(max(touching, default=-math.inf))


@pytest.mark.parametrize("name", ["square", "chunk", "one query", "left padding"])
@pytest.mark.parametrize("block_q", [1, 16])
def test_window_shares_are_softmaxes_added_up(name: str, block_q: int) -> None:
    from tests.attention.maps import REACHES

    reach = REACHES[name]()
    query, key, _ = tensors(reach)
    windows = key.unfold(2, 8, 4).mean(-1)
    found = window_shares(query, windows, reach, scaling=0.3, block_q=block_q, size=8, stride=4)
    seen = token_mask(reach, 2, 1)[:, 0]
    for row in range(2):
        for head in range(2):
            expected = torch.zeros(reach.queries, windows.shape[2])
            whole = torch.zeros(reach.queries, windows.shape[2], dtype=torch.bool)
            for i in range(reach.queries):
                for j in range(windows.shape[2]):
                    whole[i, j] = seen[row, i, 4 * j : 4 * j + 8].all()
                for member in (2 * head, 2 * head + 1):
                    scores = (windows[row, head] @ query[row, member, i] * 0.3).masked_fill(~whole[i], -math.inf)
                    expected[i] += scores.softmax(0).nan_to_num()
            for i in range(found.shape[2]):
                rows = slice(i * block_q, (i + 1) * block_q)
                total = torch.where(whole[rows].any(0), expected[rows].sum(0), -math.inf)
                assert torch.allclose(found[row, head, i], total, atol=1e-5)


def test_sums_from_longer_windows_rank_blocks_nearly_alike() -> None:
    """Of smooth keys, whose long means stand for their short ones."""
    torch.manual_seed(1)
    tokens = 512
    key = torch.randn(1, 2, tokens // 16, 8).repeat_interleave(16, 2) + 0.1 * torch.randn(1, 2, tokens, 8)
    call = Call(torch.randn(1, 4, tokens, 8), Plain(key, key), Reach.last(tokens, tokens), 0.3, mask_heads=2)
    blocks = call.reach.blocks(16, 64)
    exact, coarse = (WindowMeans(32, 16, long).scores(call, blocks) for long in (None, (128, 64)))
    assert torch.equal(exact.isneginf(), coarse.isneginf())
    best = [torch.zeros_like(x[:, :, 16:]).scatter_(-1, x[:, :, 16:].topk(3).indices, 1.0) for x in (exact, coarse)]
    assert float((best[0] * best[1]).sum() / best[0].sum()) > 0.9


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match="whole multiples"):
        WindowMeans(32, 12)
    call = Call(torch.randn(1, 2, 8, 8), Plain(*torch.randn(2, 1, 2, 8, 8)), Reach.last(8, 8), 1.0)
    with pytest.raises(OptionError, match="no multiple of the stride"):
        WindowMeans(32, 16).scores(call, call.reach.blocks(8, 8))


def brute_anchored(
    query: Tensor, key: Tensor, reach: Reach, block_q: int, block_k: int, sink: int, local: int
) -> Tensor:
    """The exact scores, relative to sinks and neighbours, block by block."""
    seen = token_mask(reach, 2, 1)[:, 0]
    found = torch.full((2, 4, -(-reach.queries // block_q), -(-reach.keys // block_k)), -math.inf)
    for row in range(2):
        for head in range(4):
            scores = query[row, head] @ key[row, head // 2].mT * 0.3
            scores = scores.masked_fill(~seen[row], -math.inf)
            for i in range(reach.queries):
                begin = max(0, i // block_q * block_q + reach.offset - local) // block_k * block_k
                near = [j for j in range(reach.keys) if j < sink or j >= begin]
                relative = scores[i] - scores[i, near].logsumexp(0)
                for j in range(found.shape[3]):
                    best = float(
                        relative[j * block_k : (j + 1) * block_k].max()
                    )  # no number for padding, which is less
                    found[row, head, i // block_q, j] = max(float(found[row, head, i // block_q, j]), best)
    return found


@pytest.mark.parametrize("name", ["square", "chunk", "left padding", "window"])
def test_anchored_scores_are_relative_to_sinks_and_neighbours(name: str) -> None:
    from tests.attention.maps import REACHES

    reach = REACHES[name]()
    query, key, _ = tensors(reach)
    query, key = query + 0.4, key - 0.7  # means to be taken out
    options = {"block_q": 16, "block_k": 8, "sink": 8, "local": 16}
    expected = brute_anchored(query, key, reach, **options)
    exact = anchored_scores(query, key, reach, scaling=0.3, num_bits=None, **options)
    assert torch.equal(exact.isneginf(), expected.isneginf())
    real = ~expected.isneginf()
    assert torch.allclose(exact[real], expected[real], atol=1e-4)
    errors = {}
    for bits, smooth in ((8, True), (4, True), (4, False)):
        rough = anchored_scores(query, key, reach, scaling=0.3, num_bits=bits, smooth=smooth, **options)
        errors[bits, smooth] = float((rough - expected)[real].abs().mean())
    assert errors[8, True] < 0.02 and errors[8, True] < errors[4, True] < errors[4, False] < 0.5
    fewer = anchored_scores(query, key, reach, scaling=0.3, num_bits=4, every=4, **options)
    every = anchored_scores(query, key, reach, scaling=0.3, num_bits=4, **options)
    assert fewer.shape == every.shape and bool((fewer <= every + 1e-5).all())
    assert bool((fewer > -math.inf).any(-1)[every.gt(-math.inf).any(-1)].all())


def test_codes_are_whole_numbers_and_zeros_stay_zero() -> None:
    x = torch.randn(3, 5, 8)
    x[0, 0] = 0.0
    codes, scale = coarse_codes(x, 4)
    assert codes.abs().max() == 7 and torch.equal(codes[0, 0], torch.zeros(8, dtype=torch.int8))
    assert bool(((codes * scale - x).abs() <= scale / 2 + 1e-6).all())


def test_low_bit_products_join_heads_by_the_greatest() -> None:
    query, key, value = tensors(Reach.last(64, 64))
    call = Call(query, Plain(key, value), Reach.last(64, 64), 0.3, mask_heads=4)
    blocks, estimator = call.reach.blocks(16, 8), LowBitProducts(sink=8, local=16)
    single = estimator.scores(call, blocks)
    joined = estimator.scores(replace(call, mask_heads=2), blocks)
    assert torch.equal(joined, single.unflatten(1, (2, 2)).amax(2))


def test_the_largest_threshold_within_a_budget_has_none_beyond_it_below() -> None:
    levels = torch.tensor([0.4, 0.2, 0.1, 0.0])
    errors = torch.tensor([[0.5, 0.1, 0.3, 0.2], [0.3, 0.05, 0.05, 0.3], [0.1, 0.01, 0.2, 0.3], [0.0, 0.0, 0.0, 0.0]])
    assert largest_within(levels, errors, 0.15).tolist() == pytest.approx([0.1, 0.4, 0.0, 0.0])


LEARNED = {
    "gate": lambda: Gated({"prefill": gate(4, 4, True)}), "windows": lambda: WindowMeans(8, 4, (32, 16)),
    "low bit": lambda: LowBitProducts(sink=8, local=8),
}  # fmt: skip


@pytest.mark.parametrize("name", [*LEARNED, "means", "extremes", "antidiagonals", "truth"])
@pytest.mark.parametrize("keys", ["zero", "alike", "one zero block"])
def test_keys_that_say_nothing_give_numbers_and_the_same_choice_each_time(name: str, keys: str) -> None:
    own = {"means": PooledMeans, "extremes": Extremes, "antidiagonals": lambda: Antidiagonals(4)}
    estimator = {**LEARNED, **own, "truth": TrueMass}[name]()
    query, key, value = tensors(Reach.last(64, 64))
    if keys == "one zero block":
        key[:, :, 16:32] = 0.0
    else:
        key = torch.zeros_like(key) if keys == "zero" else key[:, :, :1].expand_as(key)
    call = replace(call_of(query, key, value), mask_heads=4)
    blocks = call.reach.blocks(16, 16)
    first, again = (
        TopK(0.5).select(estimator.scores(fresh, blocks), blocks.some, torch.zeros_like(blocks.some))
        for fresh in (replace(call, source=Plain(call.source.keys(), value)) for _ in range(2))
    )
    scores = estimator.scores(call, blocks)
    assert not torch.isnan(scores.masked_fill(~blocks.some, 0.0)).any()
    assert torch.equal(first, again) and bool(first.any(-1).all())
    if keys == "zero" and name in ("means", "extremes", "antidiagonals"):
        assert first[0, 0].nonzero().tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [3, 0], [3, 1]]
