"""KV cache recipes small enough for tests, with parameters fitted to random keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.contracts import kv_recipes
from rarefy.kv.plan import HeadShape, KvSamples, LayerCodecs
from rarefy.kv.rotary import Rotary
from rarefy.kv.store import Arrival, LayerStore
from rarefy.recipes import discover

discover()

# Every recipe, with blocks that a few dozen tokens fill; every word of the algebra is in one of them.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("identity", {}),
    "fp8": ("fp8", {}),
    "kivi": ("kivi", {"num_bits": 4, "group_size": 4, "residual": 16}),
    "kivi3": ("kivi", {"num_bits": 3, "group_size": 8, "residual": 8, "sink": 2}),
    "turbo_quant": ("turbo_quant", {"num_bits": 4}),
    "kv_quant": ("kv_quant", {"num_bits": 4, "outliers": 0.1}),
    "kv_quant2": ("kv_quant", {"num_bits": 2, "outliers": 0.0, "importance": "equal", "rotated_keys": True}),
    "gear": ("gear", {"num_bits": 4, "group_size": 8, "block": 16, "outliers": 0.1, "sink": 1}),
    "million": ("million", {"code_bits": 4, "width": 2, "block": 8}),
}
HEADS, CHANNELS = 2, 16
ROTARY = Rotary(torch.tensor([1.0, 0.5, 0.1, 0.01, 0.3, 0.2]), 1.3)  # 12 of 16 channels, lengthened


def samples(heads: int = HEADS, channels: int = CHANNELS, tokens: int = 300, pre_rope: bool = False) -> KvSamples:
    dice = torch.Generator().manual_seed(7)
    keys, values = (torch.randn(tokens, heads, channels, generator=dice) for _ in range(2))
    weights = [torch.rand(tokens, heads, channels, generator=dice) for _ in range(2)]
    return KvSamples(keys, values, torch.arange(tokens) % 50, *weights, pre_rope=pre_rope)


def layer_codecs(name: str, **changes: Any) -> LayerCodecs:
    """How the recipe ``name`` of `RECIPES` stores 2 heads of 16 channels in float32."""
    id_, options = RECIPES[name]
    recipe = kv_recipes.get(id_)(**{**options, **changes})
    params: dict[str, Tensor] = recipe.fit(samples(pre_rope=recipe.pre_rope)) if recipe.needs else {}
    return recipe.codecs(HeadShape(HEADS, CHANNELS, CHANNELS, torch.float32), params)


def tokens(count: int, rows: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Keys and values ``[rows, 2, count, 16]``."""
    dice = torch.Generator().manual_seed(seed)
    shape = (rows, HEADS, count, CHANNELS)
    return torch.randn(shape, generator=dice), torch.randn(shape, generator=dice)


def arrival(store: LayerStore, count: int, valid: Tensor | None = None, shift: int = 0) -> Arrival:
    positions = torch.arange(store.length, store.length + count)[None] + shift
    cos, sin = ROTARY.angles(positions)
    return Arrival(valid, positions, cos, sin, ROTARY)


def filled(name: str, key: Tensor, value: Tensor, steps: list[int] | None = None, **changes: Any) -> LayerStore:
    store = LayerStore(layer_codecs(name, **changes))
    for k, v in zip(key.split(steps or key.shape[2], 2), value.split(steps or key.shape[2], 2), strict=True):
        store.append(k, v, arrival(store, k.shape[2]))
    return store
