"""Coded caches on a GPU: kernels store what codecs give, and read what the reference reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.contracts import kv_recipes
from rarefy.core.errors import FormatError, UnsupportedError
from rarefy.kv import attend, side
from rarefy.kv.plan import HeadShape
from rarefy.kv.rotary import Rotary, unrotate
from rarefy.kv.store import Arrival, LayerStore
from rarefy.recipes import discover
from tests.kv.coded import samples

pytestmark = pytest.mark.gpu
HEADS, CHANNELS, TOKENS = 4, 128, 2700
ROTARY = Rotary(500000.0 ** -(torch.arange(CHANNELS // 2) / (CHANNELS // 2)))
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("fp8", {"sink": 1}),
    "kivi": ("kivi", {"num_bits": 4, "group_size": 128, "residual": 128, "sink": 2}),
    "kivi in groups of 32": ("kivi", {"num_bits": 3}),
    "turbo_quant": ("turbo_quant", {"num_bits": 4}),
    "turbo_quant of fewer bits for values": ("turbo_quant", {"num_bits": 3, "value_bits": 2, "recent": 5}),
    "million": ("million", {"width": 2, "code_bits": 8, "steps": 1}),
    "million of plain keys": ("million", {"width": 2, "code_bits": 8, "steps": 1, "rotated_keys": False}),
    "million of 4 channels": ("million", {"width": 4, "code_bits": 8, "steps": 1}),
    "kv_quant": ("kv_quant", {"num_bits": 4}),
    "kv_quant of turned keys": ("kv_quant", {"num_bits": 3, "rotated_keys": True}),
    "gear": ("gear", {"num_bits": 4}),
    "gear of short blocks": ("gear", {"num_bits": 4, "block": 64}),
    "gear without outliers": ("gear", {"num_bits": 2, "outliers": 0.0, "rank": 4}),
}
ONE_LAUNCH = {
    "fp8", "kivi", "kivi in groups of 32", "turbo_quant", "turbo_quant of fewer bits for values", "million", "kv_quant",
    "kv_quant of turned keys", "gear", "gear without outliers",
}  # fmt: skip


def filled(name: str, key: Tensor, value: Tensor) -> LayerStore:
    discover()
    id_, options = RECIPES[name]
    recipe = kv_recipes.get(id_)(**options)
    seen = samples(HEADS, CHANNELS, 300, pre_rope=recipe.pre_rope)
    codecs = recipe.codecs(HeadShape(HEADS, CHANNELS, CHANNELS, key.dtype), recipe.fit(seen) if recipe.needs else {})
    found = LayerStore(codecs)
    for low, high in ((0, 150), (150, 151), (151, key.shape[2])):
        positions = torch.arange(low, high, device="cuda")[None]
        arrival = Arrival(None, positions, *ROTARY.angles(positions), ROTARY)
        found.append(key[:, :, low:high], value[:, :, low:high], arrival)
    return found


def tokens(count: int = TOKENS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    key, value = (torch.randn(2, HEADS, count, CHANNELS, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    key[:, :, 5:9, :3] *= 8  # outliers
    return key, value


@pytest.mark.parametrize("name", RECIPES)
def test_one_token_reads_what_the_reference_does(name: str) -> None:
    found = filled(name, *tokens())
    query = torch.randn(2, 4 * HEADS, 1, CHANNELS, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):  # the second time with the plan that was kept
        seen = attend.attend(found, query, scaling=0.09)
        expected = attend.attend(found, query, scaling=0.09, fused=False)
        torch.testing.assert_close(seen, expected, rtol=2e-2, atol=8e-3)
    assert set(found.plans) - {"same table"} == ({"whole"} if name in ONE_LAUNCH else {"segments", "pieces"})


@pytest.mark.parametrize("name", sorted(ONE_LAUNCH))
def test_kernels_store_what_codecs_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key, value = tokens(600)
    found = filled(name, key, value).tensors()
    monkeypatch.setattr(side, "fast_form", lambda codec, x: None)
    expected = filled(name, key, value).tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[label], expected[label]) for label in expected)


def test_gaps_of_positions_are_told_later() -> None:
    key, value = tokens(320)
    found = filled("kv_quant", key, value)
    positions = torch.arange(330, 394, device="cuda")[None]
    arrival = Arrival(None, positions, *ROTARY.angles(positions), ROTARY)
    found.append(key[:, :, :64], value[:, :, :64], arrival)
    with pytest.raises(UnsupportedError, match="follow each other"):
        found.settle()


def test_a_captured_step_is_the_step() -> None:
    key, value = tokens()
    found = filled("turbo_quant", key, value)
    query = torch.randn(2, 4 * HEADS, 1, CHANNELS, device="cuda", dtype=torch.bfloat16)
    expected = attend.attend(found, query, scaling=0.09)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = attend.attend(found, query, scaling=0.09)
    for _ in range(2):
        seen.zero_()
        graph.replay()
        assert torch.equal(seen, expected)


def test_faults_are_told_later() -> None:
    key, value = tokens(600)
    value[0, 1, 7, 3] = torch.inf
    with pytest.raises(FormatError, match="not finite"):
        filled("turbo_quant", key, value).settle()


def test_keys_without_rope_have_the_bits_of_torch() -> None:
    x, positions = torch.randn(2, 3, 50, 128).bfloat16(), torch.arange(50)[None] + 70_000
    cos, sin = (part[:, None] for part in Rotary(500000.0 ** -(torch.arange(64) / 64), 1.1).angles(positions))
    assert torch.equal(unrotate(x.cuda(), cos.cuda(), sin.cuda()).cpu(), unrotate(x, cos, sin))
