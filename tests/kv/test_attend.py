"""Attention over codes is attention over what they decode to, and never decodes more than a segment at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rarefy.kv import attend as module
from rarefy.kv.attend import attend, decoded, plain_store
from rarefy.kv.side import SEGMENT
from rarefy.kv.store import LayerStore
from tests.kv.coded import CHANNELS, HEADS, RECIPES, arrival, filled, layer_codecs, tokens

GROUP = 3  # query heads of a KV head


def oracle(store: LayerStore, query: Tensor, mask: Tensor | None, softcap: float | None = None) -> Tensor:
    keys, values = (tensor.double().repeat_interleave(GROUP, 1) for tensor in decoded(store))
    scores = query.double() @ keys.mT * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        count, total = query.shape[2], keys.shape[2]
        mask = torch.ones(count, total, dtype=torch.bool).tril(total - count)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask
    return (scores.softmax(-1) @ values).float()


def query(count: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, HEADS * GROUP, count, CHANNELS)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("sink", [0, 3])
def test_attention_is_that_over_what_is_decoded(name: str, sink: int) -> None:
    store = filled(name, *tokens(75), sink=sink)
    for count, mask, softcap in (
        (1, None, None),
        (6, None, 5.0),
        (5, torch.rand(2, 1, 5, 75) < 0.7, None),
        (4, torch.randn(2, 1, 4, 75), None),
    ):
        q = query(count)
        found = attend(store, q, scaling=0.3, mask=mask, softcap=softcap)
        torch.testing.assert_close(found, oracle(store, q, mask, softcap), rtol=2e-4, atol=2e-5)


def test_segments_meet_by_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2 * SEGMENT + 77
    key, value = tokens(count, rows=1)
    key[:, :, SEGMENT + 5] *= 30  # one token that all but decides it, in the second segment
    store = filled("kivi", key, value, sink=1)
    q = query(9, 1)
    whole = attend(store, q, scaling=0.3)
    torch.testing.assert_close(whole, oracle(store, q, None), rtol=2e-4, atol=2e-5)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 4 * SEGMENT * HEADS * GROUP)
    torch.testing.assert_close(attend(store, q, scaling=0.3), whole)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation within gives."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.most = max(self.most, *sizes, 0)
        return found


@pytest.mark.parametrize("name", RECIPES)
def test_no_tensor_grows_with_the_past(name: str) -> None:
    """The largest tensor of a decoding step is as large after four segments as after one but for a few sums."""
    key, value = tokens(4 * SEGMENT + 40, rows=1)
    sizes = []
    for count in (SEGMENT + 40, 4 * SEGMENT + 40):
        store = filled(name, key[:, :, :count], value[:, :, :count])
        with Largest() as largest:
            attend(store, query(1, 1), scaling=0.3)
        sizes.append(largest.most)
    assert 0 <= sizes[1] - sizes[0] < 3 * 8 * HEADS * GROUP * CHANNELS


def test_a_query_that_may_look_nowhere_gives_zero() -> None:
    store = filled("kivi", *tokens(40))
    mask = torch.zeros(2, 1, 2, 40, dtype=torch.bool)
    mask[:, :, 1] = True
    found = attend(store, query(2), scaling=0.3, mask=mask)
    assert torch.equal(found[:, :, 0], torch.zeros_like(found[:, :, 0]))
    assert torch.isfinite(found).all()


def test_plain_tensors_are_read_too() -> None:
    key, value = tokens(30)
    store = plain_store(key, value)
    q = query(30)
    torch.testing.assert_close(attend(store, q, scaling=0.3), oracle(store, q, None), rtol=2e-4, atol=2e-5)
    everything = torch.ones(2, 1, 30, 30, dtype=torch.bool)
    found = attend(store, q, scaling=0.3, causal=False)
    torch.testing.assert_close(found, oracle(store, q, everything), rtol=2e-4, atol=2e-5)


def test_the_pass_that_brings_tokens_reads_them_exactly_or_not() -> None:
    key, value = tokens(64)
    exact, coded = LayerStore(layer_codecs("kivi")), LayerStore(layer_codecs("kivi"), exact_arrival=False)
    seen = exact.append(key, value, arrival(exact, 64))
    torch.testing.assert_close(decoded(seen)[0], key)
    assert not torch.equal(decoded(coded.append(key, value))[0], key)
    torch.testing.assert_close(decoded(exact)[0], decoded(coded)[0])
