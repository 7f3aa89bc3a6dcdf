"""Which kernels serve which recipe: a codec that one of them does not know goes the slow way, and says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.contracts import kv_recipes
from rarefy.kernels.cuda import attend as decode_kernel
from rarefy.kv.codec import nbytes
from rarefy.kv.encoding import form_of
from rarefy.kv.fused import tiles_of
from rarefy.kv.native import half_of
from rarefy.kv.plan import HeadShape, LayerCodecs
from rarefy.recipes import discover
from tests.kv.coded import samples

HEADS, CHANNELS, TOKENS = 2, 128, 256
ALL = {"encode", "one launch", "triton", "native"}
# Options that are not a recipe's own, and what serves heads of 128 channels.
SERVED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "identity": ({}, {"triton", "native"}),
    "fp8": ({}, {"encode", "one launch", "triton"}),
    "kivi": ({}, ALL),
    "turbo_quant": ({}, ALL),
    "kv_quant": ({"outliers": 0.03}, {"encode", "one launch", "triton"}),
    "million": ({"steps": 1}, {"encode", "one launch", "triton"}),
    "gear": ({}, {"encode", "one launch", "triton"}),
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    discover()
    yield


def layer_codecs(name: str) -> LayerCodecs:
    recipe = kv_recipes.get(name)(**SERVED[name][0])
    params = recipe.fit(samples(HEADS, CHANNELS, pre_rope=recipe.pre_rope)) if recipe.needs else {}
    return recipe.codecs(HeadShape(HEADS, CHANNELS, CHANNELS, torch.bfloat16), params)


def test_every_recipe_says_what_serves_it() -> None:
    assert {name for name in kv_recipes if kv_recipes.get(name).__module__.startswith("rarefy.")} == set(SERVED)


@pytest.mark.parametrize("name", SERVED)
def test_kernels_know_the_codecs(name: str) -> None:
    codecs = layer_codecs(name)
    found, runs = set(ALL), []
    for codec in (codecs.keys, codecs.values):
        x = torch.randn(1, HEADS, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
        payload: dict[str, Tensor] = codec.encode(x.unflatten(2, (-1, codec.tokens)))
        assert nbytes(payload).total > 0
        runs.append(tiles_of(codec, [payload], HEADS))
        found -= {"encode"} if form_of(codec, CHANNELS, torch.device("cpu")) is None else set()
        found -= {"native"} if codecs.pre_rope or half_of(codec, payload, 0, TOKENS) is None else set()
    keys, values = runs
    if keys is None or values is None:
        found -= {"one launch", "triton"}
    elif not decode_kernel.fits(keys, values, CHANNELS, 4):
        found -= {"one launch"}
    assert found == SERVED[name][1]
