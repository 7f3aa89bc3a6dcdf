"""The decode kernel of every tile loader against attention over what the codec decodes, interpreted where no GPU is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.executors import Reference
from rarefy.attention.executors.coded import attend_coded, unreadable
from rarefy.attention.reach import Reach
from rarefy.attention.source import Stored
from rarefy.contracts import kv_recipes
from rarefy.core.errors import UnsupportedError
from rarefy.formats.grids import IntegerGrid
from rarefy.kv import attend, fused, side
from rarefy.kv.codecs import Gridded, LowRank, NormTable, Partition, RangeTable, Residual
from rarefy.kv.plan import HeadShape
from rarefy.kv.rotary import Rotary
from rarefy.kv.store import Arrival, LayerStore
from rarefy.recipes import discover
from rarefy.recipes.kv.turbo_quant import gaussian_table
from tests.kv.coded import samples

pytest.importorskip("triton")
from rarefy.kernels.coded import Tiles
from rarefy.kernels.triton.decode_attention import DecodeAttention, fits, page_counts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, HEADS, CHANNELS, TOKENS, RUN = 2, 2, 128, 256, 128
NARROW = 64
ROTARY = Rotary(10000 ** -(torch.arange(24) / 24), 1.2)


def coded(kind: str, num_bits: int, x: Tensor) -> tuple[Tiles, Tensor]:
    """``x [B, H, T, D]`` in runs of 128 tokens as the kernel takes them, and what they decode to."""
    lut = gaussian_table(num_bits)
    if kind == "dense":
        runs = tuple((part.to(DEVICE).contiguous(),) for part in x.bfloat16().split(RUN, 2))
        return Tiles("dense", runs), x.bfloat16().float()
    wide, narrow = (IntegerGrid(num_bits=num_bits, group_size=size, zero="float") for size in (32, 16))
    codec: Any = {
        "channel": lambda: Gridded(wide, "channel", 64, CHANNELS),
        "token": lambda: Gridded(narrow, "token", 32, CHANNELS),
        "norm": lambda: NormTable(lut, 32, CHANNELS),
        "range": lambda: RangeTable(lut / lut.max(), 32, CHANNELS),
    }[kind]()
    last = {"norm": (), "range": ("offset",)}.get(kind, ("zero_point",))
    names = ("codes", "scale", *last)
    payloads = [codec.encode(part.unflatten(2, (-1, codec.tokens))) for part in x.split(RUN, 2)]
    runs = tuple(tuple(payload[name].contiguous().to(DEVICE) for name in names) for payload in payloads)
    group = codec.grid.group_size if kind in ("channel", "token") else 1
    table = codec.lut.to(DEVICE) if kind in ("norm", "range") else None
    tiles = Tiles("table" if table is not None else kind, runs, num_bits, codec.tokens, group, table)
    return tiles, torch.cat([codec.decode(payload).flatten(2, 3) for payload in payloads], 2)


def oracle(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // HEADS
    keys, values = (tensor.double().repeat_interleave(group, 1) for tensor in (keys, values))
    scores = (query.double()[:, :, None] @ keys.mT)[:, :, 0] * 0.09
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return (scores.softmax(-1)[:, :, None] @ values)[:, :, 0].float(), scores.logsumexp(-1).float()


@pytest.mark.parametrize(
    ("keys", "values", "num_bits"),
    [
        ("channel", "token", 4), ("channel", "token", 3), ("channel", "token", 2), ("channel", "token", 8),
        ("token", "token", 4), ("norm", "norm", 4), ("norm", "range", 3), ("range", "norm", 2), ("dense", "dense", 16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("group", [1, 3])
def test_the_kernel_is_attention_over_what_is_decoded(keys: str, values: str, num_bits: int, group: int) -> None:
    k, dense_k = coded(keys, min(num_bits, 8), torch.randn(BATCH, HEADS, TOKENS, CHANNELS) + 3)
    v, dense_v = coded(values, min(num_bits, 8), torch.randn(BATCH, HEADS, TOKENS, CHANNELS))
    query = torch.randn(BATCH, HEADS * group, CHANNELS)
    attention = DecodeAttention(k, v, BATCH, HEADS, HEADS * group, CHANNELS, RUN, device=DEVICE, parts=2)
    found, lse = attention(query.to(DEVICE), 0.09)
    expected, expected_lse = oracle(query, dense_k, dense_v, torch.zeros(BATCH, TOKENS, dtype=torch.bool))
    torch.testing.assert_close(found.cpu(), expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=2e-3, atol=4e-3)


def test_sinks_and_padding_are_left_out() -> None:
    k, dense_k = coded("channel", 4, torch.randn(BATCH, HEADS, TOKENS, CHANNELS))
    v, dense_v = coded("token", 4, torch.randn(BATCH, HEADS, TOKENS, CHANNELS))
    query = torch.randn(BATCH, HEADS, CHANNELS)
    sinks, first = torch.tensor([[131, 132], [0, -1]]), torch.tensor([131, 0])
    hidden = torch.arange(TOKENS)[None] < first[:, None]
    hidden[0, 131:133] = hidden[1, 0] = True
    attention = DecodeAttention(
        k, v, BATCH, HEADS, HEADS, CHANNELS, RUN, device=DEVICE, parts=4, sinks=sinks.to(DEVICE), first=first.to(DEVICE)
    )
    found, lse = attention(query.to(DEVICE), 0.09)
    expected, expected_lse = oracle(query, dense_k, dense_v, hidden)
    torch.testing.assert_close(found.cpu(), expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=2e-3, atol=4e-3)


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("identity", {}),
    "kivi": ("kivi", {"num_bits": 4, "group_size": 16, "residual": 64}),
    "turbo_quant": ("turbo_quant", {"num_bits": 4}),
    "kv_quant": ("kv_quant", {"num_bits": 4, "outliers": 0.04}),
    "kv_quant2": ("kv_quant", {"num_bits": 2, "outliers": 0.0, "rotated_keys": True}),
    "gear": ("gear", {"num_bits": 4, "group_size": 32, "block": 64, "outliers": 0.05}),
    "million": ("million", {"width": 2, "code_bits": 5}),
    "million of plain keys": ("million", {"width": 2, "code_bits": 5, "rotated_keys": False}),
    "million4": ("million", {"width": 4, "code_bits": 8, "steps": 2}),
}


def narrow_store(name: str, **changes: Any) -> LayerStore:
    """A store of 2 heads of 64 channels, of which 48 are rotated."""
    discover()
    id_, options = RECIPES[name]
    recipe = kv_recipes.get(id_)(**{"sink": 2, **options, **changes})
    shape = HeadShape(HEADS, NARROW, NARROW, torch.float32)
    seen = samples(HEADS, NARROW, 600, pre_rope=recipe.pre_rope)
    return LayerStore(recipe.codecs(shape, recipe.fit(seen) if recipe.needs else {}))


@pytest.mark.parametrize("name", RECIPES)
def test_whole_segments_of_a_store_go_through_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 256 tokens here: one of them, a piece of 128 tokens, the rest and sinks are one attention."""
    for module in (side, fused, attend):
        monkeypatch.setattr(module, "SEGMENT", 2 * RUN)
    store = narrow_store(name)
    for count in (150, 330, 1):
        key, value = (torch.randn(BATCH, HEADS, count, NARROW) for _ in range(2))
        key[:, :, :2] *= 3
        key[:, :, 5:9, :3] *= 8  # outliers
        positions = torch.arange(store.length, store.length + count)[None] + torch.tensor([[0], [7000]])
        cos, sin = ROTARY.angles(positions)
        store.append(key.to(DEVICE), value.to(DEVICE), Arrival(None, positions, cos, sin, ROTARY))
    query = torch.randn(BATCH, HEADS * 3, 1, NARROW).to(DEVICE)
    done = fused.fused_segments(store, query, 0.1)
    assert done is not None and done[2] == 3 * RUN and set(store.plans) == {"segments", "pieces"}
    for _ in range(2):  # the second time with the plan that was kept
        found = attend.attend(store, query, scaling=0.1, fused=True)
        expected = attend.attend(store, query, scaling=0.1, fused=False)
        torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)
    store.map_(lambda tensor: tensor.flip(0))
    torch.testing.assert_close(attend.attend(store, query.flip(0), scaling=0.1, fused=True).flip(0), found)


@pytest.mark.parametrize(
    "name", ["kivi", "turbo_quant", "kv_quant", "gear", "million", "million of plain keys", "identity"]
)
def test_listed_blocks_of_a_store_are_read_in_code(name: str) -> None:
    """Runs of several lengths, sinks, padding, blocks of the newest tokens, and blocks that no list names."""
    store = narrow_store(name)
    for count in (200, 40, 80, 1):
        key, value = (torch.randn(BATCH, HEADS, count, NARROW) for _ in range(2))
        key[:, :, 5:9, :3] *= 8
        positions = torch.arange(store.length, store.length + count)[None] + torch.tensor([[0], [7000]])
        cos, sin = ROTARY.angles(positions)
        store.append(key.to(DEVICE), value.to(DEVICE), Arrival(None, positions, cos, sin, ROTARY))
    source, query = Stored(store), torch.randn(BATCH, HEADS * 3, 1, NARROW).to(DEVICE)
    first = torch.tensor([0, 37], device=DEVICE)
    reach = Reach(1, store.length, store.length - 1, first=first)
    blocks = reach.blocks(1, 64, DEVICE)
    keep = torch.rand(BATCH, HEADS, 1, blocks.columns, device=DEVICE) < 0.5
    keep[0, 0], keep[1, 1] = True, False
    block_map = BlockMap.from_mask(keep, reach, blocks)
    assert unreadable(query, source, block_map) is None
    found, lse = attend_coded(query, source, block_map, 0.1)
    expected, expected_lse = Reference().run(query, source, block_map, 0.1)
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=4e-3, atol=4e-3)
    plan = store.plans["blocks"]
    assert plan.attention.tokens >= 192
    unreadable(query, source, block_map)
    assert store.plans["blocks"] is plan
    twice = BlockMap.from_mask(keep.repeat_interleave(3, 1), reach, blocks)
    assert "by KV head" in str(unreadable(query, source, twice))


def test_pages_end_where_one_would_lie_in_two_runs() -> None:
    assert page_counts(([256, 128], [256, 128]), 128) == [[2, 1], [2, 1]]
    assert page_counts(([256, 96, 32], [384]), 128) == [[2, 0, 0], [2]]
    assert page_counts(([256, 192, 64], [512]), 128) == [[2, 1, 0], [3]]
    assert page_counts(([], [512]), 128) == [[], [0]]


def test_codecs_without_a_loader_are_left_to_the_reference() -> None:
    codec = Partition([NormTable(gaussian_table(4), 32, 64), LowRank(2, 32, 64)], [64, 64])
    assert fused.tiles_of(codec, [], HEADS) is None
    twice = Residual(NormTable(gaussian_table(4), 32, 64), LowRank(2, 32, 64), LowRank(2, 32, 64))
    payload = twice.encode(torch.randn(1, 1, 1, 32, 64))
    assert fused.tiles_of(twice, [payload], 1) is None


def test_what_does_not_fit_is_known_beforehand() -> None:
    k, _ = coded("channel", 4, torch.randn(BATCH, HEADS, TOKENS, CHANNELS))
    v, _ = coded("token", 4, torch.randn(BATCH, HEADS, TOKENS, CHANNELS))
    assert fits(k, v, CHANNELS, RUN)
    assert not fits(k, v, 48, RUN) and not fits(k, v, CHANNELS, 100)
    with pytest.raises(UnsupportedError, match="100 tokens of 128 channels in tiles of 16 rows"):
        DecodeAttention(k, v, BATCH, HEADS, HEADS, CHANNELS, 100, device=DEVICE)
