"""Blocks that are encoded aside end as the same bytes, and are read exactly until then."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from rarefy.kv.attend import attend
from rarefy.kv.codec import Payload
from rarefy.kv.codecs import Exact
from rarefy.kv.later import Encoder
from rarefy.kv.plan import LayerCodecs
from rarefy.kv.store import LayerStore
from tests.kv.coded import CHANNELS, HEADS, RECIPES, arrival, filled, layer_codecs, tokens


class Waiting(Exact):
    """A codec that halves numbers, once it may."""

    def __init__(self) -> None:
        super().__init__(torch.float32, 8)
        self.allowed = threading.Event()

    def encode(self, x: Tensor) -> Payload:
        assert self.allowed.wait(20)
        return super().encode(x / 2)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("step", [7, 75])
def test_what_is_stored_is_the_same(name: str, step: int) -> None:
    key, value = tokens(75)
    aside = LayerStore(layer_codecs(name), encoder=Encoder())
    for k, v in zip(key.split(step, 2), value.split(step, 2), strict=True):
        aside.append(k, v, arrival(aside, k.shape[2]))
        aside.settle()
    expected, found = filled(name, key, value, step).tensors(), aside.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[label], expected[label]) for label in expected)


def test_tokens_are_read_exactly_until_they_are_in_code() -> None:
    codec, plain = Waiting(), Exact(torch.float32, 8)
    store = LayerStore(LayerCodecs(codec, plain), encoder=Encoder())
    exact = LayerStore(LayerCodecs(plain, plain))
    key, value = tokens(40)
    for part in (slice(0, 20), slice(20, 30)):
        store.append(key[:, :, part], value[:, :, part])
        exact.append(key[:, :, part], value[:, :, part])
    query = torch.randn(2, HEADS, 1, CHANNELS)
    assert store.keys is not None and store.keys.coded == 0
    torch.testing.assert_close(attend(store, query, scaling=0.3), attend(exact, query, scaling=0.3))
    fork = store.copy()
    codec.allowed.set()
    store.settle()
    assert store.keys.coded == 16 and fork.keys is not None and fork.keys.coded == 0
    torch.testing.assert_close(store.keys.payload()["exact"].flatten(2, 3), key[:, :, :16] / 2)
    store.append(key[:, :, 30:], value[:, :, 30:])
    store.crop(3)
    assert store.length == 37 and store.keys.coded == 32


def test_what_fails_aside_fails_where_it_is_taken_over() -> None:
    class Broken(Exact):
        def encode(self, x: Tensor) -> Payload:
            raise ArithmeticError("no codes today")

    broken = Broken(torch.float32, 8)
    store = LayerStore(LayerCodecs(broken, broken), encoder=Encoder())
    store.append(*tokens(20))
    with pytest.raises(ArithmeticError, match="no codes today"):
        store.settle()
