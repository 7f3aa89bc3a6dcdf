"""Stores whose blocks a GPU's kernels encode and read, which this processor runs, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.contracts import kv_recipes
from rarefy.core.errors import FormatError, UnsupportedError
from rarefy.kernels.cuda import attend as decode_kernel
from rarefy.kernels.cuda import encode as encode_kernel
from rarefy.kernels.cuda import encode_blocks as block_kernel
from rarefy.kv import attend, encoding, side, whole
from rarefy.kv.plan import HeadShape
from rarefy.kv.rotary import Rotary
from rarefy.kv.store import Arrival, LayerStore
from tests.kernels.cuda import emulation
from tests.kv.coded import samples

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="there is no C++ compiler")

HEADS, CHANNELS = 2, 128
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("fp8", {"recent": 3}),
    "kivi": ("kivi", {"num_bits": 4, "group_size": 32, "residual": 128, "sink": 2}),
    "turbo_quant": ("turbo_quant", {"num_bits": 3, "recent": 5}),
    "million": ("million", {"width": 2, "code_bits": 8, "steps": 1}),
    "kv_quant": ("kv_quant", {"num_bits": 4, "outliers": 0.04}),
    "gear": ("gear", {"num_bits": 4}),
    "gear of few": ("gear", {"num_bits": 2, "group_size": 128, "outliers": 0.0, "rank": 1, "sink": 1}),
    "kv_quant3": ("kv_quant", {"num_bits": 3, "outliers": 0.02, "rotated_keys": True}),
}
ROTARY = Rotary(10000 ** -(torch.arange(64) / 64), 1.2)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    ran = []

    def encode(code: encode_kernel.Code, x: Tensor, faults: Tensor, **tables: Tensor | None) -> encode_kernel.Encoded:
        ran.append("encode")
        found, bits = emulation.encoded(code, x, **tables)
        faults |= bits
        return found

    def encode_blocks(
        code: block_kernel.BlockCode, x: Tensor, faults: Tensor, **tables: Tensor | None
    ) -> block_kernel.EncodedBlocks:
        ran.append("encode")
        found, bits = emulation.encoded_blocks(code, x, **tables)
        faults |= bits
        return found

    def attention(self: Any, query: Tensor, scaling: float, exact: Any = None) -> tuple[Tensor, Tensor]:
        ran.append("attend")
        return emulation.attention(self, query, scaling, exact)

    def form(codec: Any, x: Tensor) -> Any:
        return encoding.form_of(codec, x.shape[3], x.device)

    monkeypatch.setattr(encode_kernel, "encode", encode)
    monkeypatch.setattr(block_kernel, "encode", encode_blocks)
    monkeypatch.setattr(decode_kernel.CodedAttention, "__call__", attention)
    monkeypatch.setattr(whole, "available", lambda query: True)
    monkeypatch.setattr(side, "fast_form", form)
    return ran


def empty_store(name: str) -> LayerStore:
    id_, options = RECIPES[name]
    recipe = kv_recipes.get(id_)(**options)
    params = recipe.fit(samples(HEADS, CHANNELS, 300, pre_rope=recipe.pre_rope)) if recipe.needs else {}
    return LayerStore(recipe.codecs(HeadShape(HEADS, CHANNELS, CHANNELS, torch.bfloat16), params))


def filled(name: str, key: Tensor, value: Tensor, valid: Tensor | None = None) -> LayerStore:
    found = empty_store(name)
    for low, high in ((0, 200), (200, 201), (201, key.shape[2])):
        own = None if valid is None else valid[:, low:high]
        positions = torch.arange(low, high)[None] + torch.tensor([[0], [5000]])
        arrival = Arrival(own, positions, *ROTARY.angles(positions), ROTARY)
        found.append(key[:, :, low:high], value[:, :, low:high], arrival)
    return found


def tokens(count: int) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(3)
    key, value = (torch.randn(2, HEADS, count, CHANNELS, generator=dice) for _ in range(2))
    key[:, :, 5:9, :3] *= 6  # outliers
    return key.bfloat16(), value.bfloat16()


@pytest.mark.parametrize("name", RECIPES)
def test_kernels_store_and_read_what_the_reference_does(name: str, emulated: list[str]) -> None:
    key, value = tokens(421)
    found = filled(name, key, value)
    query = torch.randn(2, 3 * HEADS, 1, CHANNELS).bfloat16()
    seen = attend.attend(found, query, scaling=0.1)
    assert emulated.count("attend") == 1 and emulated.count("encode") >= 4
    expected = attend.attend(found, query, scaling=0.1, fused=False)
    torch.testing.assert_close(seen, expected, rtol=1e-2, atol=6e-3)
    positions = torch.tensor([[421], [5421]])
    found.append(key[:, :, :1], value[:, :, :1], Arrival(None, positions, *ROTARY.angles(positions), ROTARY))
    fresh = attend.attend(found, query, scaling=0.1)
    assert not torch.equal(fresh, seen)
    torch.testing.assert_close(fresh, attend.attend(found, query, scaling=0.1, fused=False), rtol=1e-2, atol=6e-3)


@pytest.mark.parametrize("name", ["kv_quant", "kv_quant3"])
def test_long_tiles_have_outliers_too(name: str, emulated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shape = decode_kernel.Shape(warps=2, tile=128)
    monkeypatch.setattr(decode_kernel.CodedAttention, "_shape", lambda self, device, tokens: shape)
    found = filled(name, *tokens(421))
    query = torch.randn(2, 3 * HEADS, 1, CHANNELS).bfloat16()
    seen = attend.attend(found, query, scaling=0.1)
    expected = attend.attend(found, query, scaling=0.1, fused=False)
    assert emulated.count("attend") == 1
    torch.testing.assert_close(seen, expected, rtol=1e-2, atol=6e-3)


def test_keys_and_values_may_take_unlike_bits(emulated: list[str]) -> None:
    more, fewer = empty_store("kv_quant").codecs, empty_store("kv_quant3").codecs
    found = LayerStore(replace(more, values=fewer.values))
    key, value = tokens(300)
    positions = torch.arange(300)[None] + torch.tensor([[0], [5000]])
    found.append(key, value, Arrival(None, positions, *ROTARY.angles(positions), ROTARY))
    query = torch.randn(2, 3 * HEADS, 1, CHANNELS).bfloat16()
    seen = attend.attend(found, query, scaling=0.1)
    assert emulated.count("attend") == 1
    torch.testing.assert_close(seen, attend.attend(found, query, scaling=0.1, fused=False), rtol=1e-2, atol=6e-3)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_stored_is_what_codecs_give(
    name: str, padded: bool, emulated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, value = tokens(300)
    valid = None
    if padded:
        valid = torch.ones(2, 300, dtype=torch.bool)
        valid[1, :40] = False
    found = filled(name, key, value, valid).tensors()
    assert emulated
    monkeypatch.setattr(side, "fast_form", lambda codec, x: None)
    expected = filled(name, key, value, valid).tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[label], expected[label]) for label in expected)


def test_faults_are_told_later(emulated: list[str]) -> None:
    key, value = tokens(130)
    value[0, 1, 7, 3] = torch.inf
    found = empty_store("turbo_quant")
    found.append(key, value)
    with pytest.raises(FormatError, match="not finite"):
        found.append(key, value)
    again = empty_store("kivi")
    again.append(key * 1e30, torch.zeros_like(value))
    with pytest.raises(FormatError, match="overflows"):
        again.nbytes()


def test_gaps_of_positions_are_told_later(emulated: list[str]) -> None:
    key, value = tokens(96)
    found = empty_store("kv_quant")
    for start in (0, 32, 70):
        positions = torch.arange(start, start + 32).repeat(2, 1)
        arrival = Arrival(None, positions, *ROTARY.angles(positions), ROTARY)
        found.append(key[:, :, :32], value[:, :, :32], arrival)
    with pytest.raises(UnsupportedError, match="follow each other"):
        found.settle()
    assert "encode" in emulated
