"""The decode kernel of every tile loader against attention over what the codec decodes, interpreted where no GPU is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.contracts import kv_recipes
from rarefy.formats.grids import IntegerGrid
from rarefy.kv import attend, fused, side
from rarefy.kv.codecs import Gridded, LowRank, NormTable, RangeTable, Residual
from rarefy.kv.plan import HeadShape
from rarefy.kv.store import LayerStore
from rarefy.recipes import discover
from rarefy.recipes.kv.turbo_quant import gaussian_table

pytest.importorskip("triton")
from rarefy.kernels.triton.decode_attention import DecodeAttention, Tiles, fits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, HEADS, CHANNELS, TOKENS, RUN = 2, 2, 32, 256, 128


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
    scores = (query.double()[:, :, None] @ keys.mT)[:, :, 0] * 0.2
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
    found, lse = attention(query.to(DEVICE), 0.2)
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
    found, lse = attention(query.to(DEVICE), 0.2)
    expected, expected_lse = oracle(query, dense_k, dense_v, hidden)
    torch.testing.assert_close(found.cpu(), expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("recipe", ["kivi", "turbo_quant", "identity"])
def test_whole_segments_of_a_store_go_through_the_kernel(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 128 tokens here: the kernel's part, the rest and sinks are one attention."""
    for module in (side, fused, attend):
        monkeypatch.setattr(module, "SEGMENT", RUN)
    options = {"kivi": {"num_bits": 4, "group_size": 16, "residual": 32}}.get(recipe, {})
    discover()
    chosen = kv_recipes.get(recipe)(sink=2, **options)
    store = LayerStore(chosen.codecs(HeadShape(HEADS, CHANNELS, CHANNELS, torch.float32), {}))
    for count in (150, 140, 1):
        key, value = (torch.randn(BATCH, HEADS, count, CHANNELS) for _ in range(2))
        key[:, :, :2] *= 3
        store.append(key.to(DEVICE), value.to(DEVICE))
    query = torch.randn(BATCH, HEADS * 3, 1, CHANNELS).to(DEVICE)
    done = fused.fused_segments(store, query, 0.2)
    assert done is not None and done[2] == 2 * RUN
    for _ in range(2):  # the second time with the plan that was kept
        found = attend.attend(store, query, scaling=0.2, fused=True)
        expected = attend.attend(store, query, scaling=0.2, fused=False)
        torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)
    store.map_(lambda tensor: tensor.flip(0))
    torch.testing.assert_close(attend.attend(store, query.flip(0), scaling=0.2, fused=True).flip(0), found)


def test_codecs_without_a_loader_are_left_to_the_reference() -> None:
    codec = Residual(NormTable(gaussian_table(4), 32, CHANNELS), LowRank(2, 32, CHANNELS))
    assert fused.tiles_of(codec, []) is None


def test_what_does_not_fit_is_known_beforehand() -> None:
    k, _ = coded("channel", 4, torch.randn(BATCH, HEADS, TOKENS, CHANNELS))
    v, _ = coded("token", 4, torch.randn(BATCH, HEADS, TOKENS, CHANNELS))
    assert fits(k, v, CHANNELS, RUN)
    assert not fits(k, v, 48, RUN) and not fits(k, v, CHANNELS, 100)
    with pytest.raises(ValueError, match="100 tokens in tiles of 32 by 32 channels"):
        DecodeAttention(k, v, BATCH, HEADS, HEADS, CHANNELS, 100, device=DEVICE)
