"""Attention over codes by the native library against the reference, for every codec that it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rarefy.contracts import kv_recipes
from rarefy.core.errors import FormatError
from rarefy.kernels.cpu import attend as native_attend
from rarefy.kernels.cpu import library
from rarefy.kernels.cpu.attend import Half, Stretch
from rarefy.kv import attend, native, side
from rarefy.kv.codecs import RangeTable
from rarefy.kv.plan import HeadShape, LayerCodecs
from rarefy.kv.store import LayerStore
from rarefy.recipes import discover
from rarefy.recipes.kv.turbo_quant import gaussian_table

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library was not built")
BATCH, HEADS = 2, 2
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("identity", {}),
    "kivi2": ("kivi", {"num_bits": 2, "group_size": 32, "residual": 64}),
    "kivi3": ("kivi", {"num_bits": 3, "group_size": 64, "residual": 64}),
    "kivi4": ("kivi", {"num_bits": 4, "group_size": 16, "residual": 128}),
    "kivi4 of one group": ("kivi", {"num_bits": 4, "group_size": 32, "residual": 32}),
    "kivi8": ("kivi", {"num_bits": 8, "group_size": 64, "residual": 256}),
    "turbo_quant3": ("turbo_quant", {"num_bits": 3}),
    "turbo_quant4": ("turbo_quant", {"num_bits": 4, "value_bits": 2}),
}


def filled(name: str, channels: int, dtype: torch.dtype = torch.float32) -> LayerStore:
    discover()
    id_, options = RECIPES[name]
    recipe = kv_recipes.get(id_)(**{"sink": 2, **options})
    return grown(recipe.codecs(HeadShape(HEADS, channels, channels, dtype), {}), channels, dtype)


def grown(codecs: LayerCodecs, channels: int, dtype: torch.dtype = torch.float32) -> LayerStore:
    store = LayerStore(codecs)
    for count in (150, 300, 1, 180):
        key, value = (torch.randn(BATCH, HEADS, count, channels, dtype=dtype) for _ in range(2))
        key[:, :, :2] *= 3
        store.append(key + 1, value)
    return store


@pytest.mark.parametrize("instructions", library.supported() if library.available() else [])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("channels", "group"), [(64, 4), (128, 3)])
def test_it_is_the_reference(
    name: str, channels: int, group: int, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of 256 tokens here."""
    for module in (side, native, attend):
        monkeypatch.setattr(module, "SEGMENT", 256)
    store = filled(name, channels)
    query = torch.randn(BATCH, HEADS * group, 1, channels)
    with library.using(instructions):
        done = native.attended(store, query, 0.1)
        assert done is not None and store.keys is not None and store.values is not None
        assert 512 <= done[2] <= store.length and ("turbo" in name or done[2] == store.length)
        found = attend.attend(store, query, scaling=0.1)
    expected = attend.attend(store, query, scaling=0.1, fused=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_numbers_of_16_bits(dtype: torch.dtype) -> None:
    store = filled("identity", 64, dtype)
    query = torch.randn(BATCH, HEADS * 6, 1, 64, dtype=dtype)
    found = attend.attend(store, query, scaling=0.1)
    torch.testing.assert_close(found, attend.attend(store, query, scaling=0.1, fused=False))


def test_numbers_with_an_offset_for_each_token() -> None:
    table = RangeTable(gaussian_table(4) / 3, 32, 64)
    store = grown(LayerCodecs(table, table), 64)
    query = torch.randn(BATCH, HEADS, 1, 64)
    assert native.attended(store, query, 0.1) is not None
    found = attend.attend(store, query, scaling=0.1)
    torch.testing.assert_close(found, attend.attend(store, query, scaling=0.1, fused=False), rtol=1e-4, atol=1e-5)


def test_what_it_cannot_read_is_left_to_the_reference() -> None:
    store = filled("identity", 24)  # channels that are no multiple of 16
    assert native.attended(store, torch.randn(BATCH, HEADS, 1, 24), 0.1) is None
    store = filled("kivi4", 80)  # rows of 10 chunks
    assert native.attended(store, torch.randn(BATCH, HEADS, 1, 80), 0.1) is None


def test_wrong_sizes_are_refused() -> None:
    plain = Half("dense", 0, 8, (torch.zeros(1, 1, 8, 16),))
    query = torch.zeros(1, 1, 1, 16)
    with pytest.raises(FormatError, match="9 tokens are read of plain numbers for 8"):
        native_attend.attend([Stretch(0, 9, (Half("dense", 0, 9, plain.numbers),), (plain,))], query, 1.0, None)
    coded = Half("token", 0, 8, (torch.zeros(1, 1, 9, dtype=torch.int32), torch.zeros(1, 1, 8).half()), 4, 1, 16)
    with pytest.raises(FormatError, match="8 tokens of 1 heads have 9 numbers"):
        native_attend.attend([Stretch(0, 8, (coded,), (plain,))], query, 1.0, None)
    with pytest.raises(FormatError, match="not covered"):
        native_attend.attend([Stretch(0, 9, (plain,), (plain,))], query, 1.0, None)
    out, lse = native_attend.attend([Stretch(0, 8, (plain,), (plain,))], query, 1.0, torch.arange(8)[None])
    assert not out.any() and float(lse) == -torch.inf
