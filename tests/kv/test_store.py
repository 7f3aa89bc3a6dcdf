"""The store of a layer: what is kept does not depend on how tokens came, and goes where its rows go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import FormatError, UnsupportedError
from rarefy.formats.grids import IntegerGrid
from rarefy.kv.attend import decoded
from rarefy.kv.codecs import Exact, Gridded
from rarefy.kv.plan import LayerCodecs
from rarefy.kv.rotary import unrotate
from rarefy.kv.side import SEGMENT
from rarefy.kv.store import Arrival, LayerStore, SideState
from tests.kv.coded import CHANNELS, HEADS, RECIPES, ROTARY, arrival, filled, layer_codecs, tokens
from tests.zoo import same_bytes

each_recipe = pytest.mark.parametrize("name", RECIPES)


def close(left: LayerStore, right: LayerStore) -> None:
    """Equal in every code; floats as nearly as sums in another order are."""
    mine, other = left.tensors(), right.tensors()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.shape == other[name].shape, name
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, other[name], rtol=2e-3, atol=2e-3, msg=name)
        else:
            assert (tensor != other[name]).sum() <= 0.01 * tensor.numel(), name


@each_recipe
@pytest.mark.parametrize("steps", [[1] * 70, [3, 40, 27], [69, 1]])
def test_how_tokens_come_does_not_matter(name: str, steps: list[int]) -> None:
    key, value = tokens(70)
    close(filled(name, key, value), filled(name, key, value, steps))


@each_recipe
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 64, 65])
def test_every_length(name: str, count: int) -> None:
    key, value = tokens(count)
    store = filled(name, key, value)
    assert store.length == count
    if count:
        keys, values = decoded(store)
        assert keys.shape == key.shape and values.shape == value.shape
        assert store.numbers() == key.numel() + value.numel()


@each_recipe
def test_what_is_forgotten_was_never_there(name: str) -> None:
    key, value = tokens(80)
    changes = {} if "kivi" in name or name == "identity" else {"recent": 24}
    store = filled(name, key[:, :, :70], value[:, :, :70], **changes)
    coded = store.keys.coded  # type: ignore[union-attr]
    back = min(4, 70 - coded)  # within the tail nothing is lost
    store.crop(back)
    store.append(key[:, :, 70 - back :], value[:, :, 70 - back :], arrival(store, 10 + back))
    close(store, filled(name, key, value, **changes))


@each_recipe
def test_forgetting_into_blocks_keeps_what_they_say(name: str) -> None:
    key, value = tokens(70)
    store = filled(name, key, value)
    before = decoded(store)
    store.crop(41)
    assert store.length == 29
    for mine, old in zip(decoded(store), before, strict=True):
        torch.testing.assert_close(mine, old[:, :, :29], rtol=1e-4, atol=1e-4)
    store.crop(29)
    assert store.length == 0
    store.append(key, value, arrival(store, 70))
    close(store, filled(name, key, value))


@each_recipe
def test_a_fork_goes_its_own_way(name: str) -> None:
    key, value = tokens(50)
    store = filled(name, key, value)
    before = {label: tensor.clone() for label, tensor in store.tensors().items()}
    fork = store.copy()
    more = tokens(40, seed=3)
    fork.append(*more, arrival(fork, 40))
    fork.crop(60)
    fork.map_(lambda tensor: tensor.flip(0))
    assert same_bytes(store.tensors(), before)
    store.append(*more, arrival(store, 40))
    close(store, filled(name, torch.cat([key, more[0]], 2), torch.cat([value, more[1]], 2)))


@each_recipe
def test_rows_go_where_they_are_sent(name: str) -> None:
    key, value = tokens(50, rows=3)
    order = torch.tensor([2, 0, 0, 1])
    store = filled(name, key, value)
    store.map_(lambda tensor: tensor.index_select(0, order))
    close(store, filled(name, key[order], value[order]))


@each_recipe
def test_padding_is_as_if_it_were_not(name: str) -> None:
    """Whatever stands where padding is, NaN included, codes of valid tokens are the same."""
    key, value = tokens(50)
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[0, :21] = False

    def padded(filler: float) -> LayerStore:
        own = [tensor.clone() for tensor in (key, value)]
        for tensor in own:
            tensor[0, :, :21] = filler
        store = LayerStore(layer_codecs(name))
        store.append(*own, arrival(store, 50, valid))
        return store

    left, right = decoded(padded(1e4)), decoded(padded(torch.nan))
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one[0, :, 21:], other[0, :, 21:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-5)


@each_recipe
def test_sinks_are_exact_and_stretch_no_range(name: str) -> None:
    key, value = tokens(50)
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[0, :5] = False
    mild = filled_with_sinks(name, key, value, valid)
    key[0, :, 5:7] *= 1000
    value[0, :, 5:7] *= 1000
    wild = filled_with_sinks(name, key, value, valid)
    for one, other, exact in zip(decoded(mild), decoded(wild), (key, value), strict=True):
        torch.testing.assert_close(one[0, :, 7:], other[0, :, 7:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other[0, :, 5:7], exact[0, :, 5:7])
        torch.testing.assert_close(other[1, :, :2], exact[1, :, :2])


def filled_with_sinks(name: str, key: Tensor, value: Tensor, valid: Tensor) -> LayerStore:
    store = LayerStore(layer_codecs(name, sink=2))
    store.append(key[:, :, :6], value[:, :, :6], arrival(store, 6, valid[:, :6]))
    store.append(key[:, :, 6:], value[:, :, 6:], arrival(store, 44, valid[:, 6:]))
    return store


@each_recipe
def test_a_restored_store_is_the_same(name: str) -> None:
    key, value = tokens(50)
    store = filled(name, key, value)
    twin = LayerStore(store.codecs)
    twin.restore_({label: tensor.clone() for label, tensor in store.tensors().items()})
    assert same_bytes(twin.tensors(), store.tensors())
    more = tokens(40, seed=3)
    for each in (store, twin):
        each.append(*more, arrival(each, 40))
    assert same_bytes(twin.tensors(), store.tensors())


@each_recipe
def test_bytes_are_those_that_exist(name: str) -> None:
    store = filled(name, *tokens(100))
    counted = store.nbytes()
    # Frequencies belong to the model, and flags of what is in the tail are not worth a byte per block.
    uncounted = ("keys.valid", "values.valid", "rope.started", "rope.factor", "rope.inv_freq")
    found = [tensor for label, tensor in store.tensors().items() if label not in uncounted]
    assert counted.total == sum(tensor.numel() * tensor.element_size() for tensor in found)


def test_not_finite_is_named() -> None:
    key, value = tokens(40)
    value[1, 0, 7, 3] = torch.inf
    store = LayerStore(layer_codecs("kivi"), "layer 4")
    with pytest.raises(FormatError, match=r"values of layer 4 are not finite at token 7 of row 1; load"):
        store.append(key, value)


def test_positions_with_gaps_are_refused_where_they_matter() -> None:
    key, value = tokens(40)
    store = LayerStore(layer_codecs("kv_quant"), "layer 2")
    gaps = arrival(store, 40)
    gaps.positions = gaps.positions * 2  # type: ignore[operator]
    with pytest.raises(UnsupportedError, match="Positions of layer 2 do not follow each other"):
        store.append(key, value, gaps)
    with pytest.raises(UnsupportedError, match="positions of layer 2 are not known"):
        LayerStore(layer_codecs("kv_quant"), "layer 2").append(key, value)
    LayerStore(layer_codecs("kivi")).append(key, value)


@pytest.mark.parametrize("wrong", [None, 33, 40])
def test_positions_of_single_tokens_are_compared_when_they_matter(wrong: int | None) -> None:
    """Also of copies, and where rows change places; with weights, 2^40 is beyond what an int64 has."""
    key, value = tokens(64)
    store = LayerStore(layer_codecs("kv_quant"), "layer 2")
    start = torch.tensor([[3], [1 << 40]])

    def at(low: int, high: int) -> Arrival:
        positions = torch.arange(low, high) + start + (low == wrong) * torch.tensor([[0], [1]])
        return Arrival(None, positions, *ROTARY.angles(positions), ROTARY)

    store.append(key[:, :, :32], value[:, :, :32], at(0, 32))
    for token in range(32, 63):
        store = store.append(key[:, :, token : token + 1], value[:, :, token : token + 1], at(token, token + 1)).copy()
        if token == 36:
            store.map_(lambda x: x.flip(0))
            start = start.flip(0)
    last = key[:, :, 63:], value[:, :, 63:], at(63, 64)
    if wrong is None:
        assert store.append(*last).length == 64
    else:
        with pytest.raises(UnsupportedError, match="Positions of layer 2 do not follow each other"):
            store.append(*last)


def test_rotation_is_undone_also_where_it_is_partial_and_scaled() -> None:
    x, positions = torch.randn(2, HEADS, 9, CHANNELS), torch.arange(9)[None] + 1000
    cos, sin = ROTARY.angles(positions)
    turned = ROTARY.rotate(x, positions.expand(2, -1))
    torch.testing.assert_close(unrotate(turned, cos[:, None], sin[:, None]), x, rtol=1e-4, atol=1e-5)
    assert torch.equal(turned[..., 12:], x[..., 12:])


def test_runs_never_cross_a_segment_and_few_are_short() -> None:
    key, value = tokens(2 * SEGMENT + 100, rows=1)
    codec = Gridded(IntegerGrid(num_bits=4, zero="float"), "token", 4, CHANNELS)
    store = LayerStore(LayerCodecs(codec, codec))
    for k, v in zip(key.split(7, 2), value.split(7, 2), strict=True):
        store.append(k, v)
    assert store.keys is not None
    assert all(run.start // SEGMENT == (run.stop - 1) // SEGMENT for run in store.keys.runs)
    assert len(store.keys.runs) < 12
    assert [run.stop - run.start for run in store.keys.runs][:2] == [SEGMENT, SEGMENT]


def test_state_of_others_goes_along() -> None:
    key, value = tokens(48)
    store = LayerStore(LayerCodecs(Exact(torch.float32, 8), Exact(torch.float32, 8)))
    store.append(key, value)
    store.state["pages"] = SideState({"lowest": torch.arange(24.0).reshape(2, 2, 6)}, tokens=8)
    store.map_(lambda tensor: tensor.flip(0))
    assert store.state["pages"].tensors["lowest"][0, 0, 0] == 12
    store.crop(9)
    assert store.state["pages"].tensors["lowest"].shape == (2, 2, 4)  # the fifth page is not whole any more
    twin = LayerStore(store.codecs)
    twin.restore_(store.tensors())
    assert torch.equal(twin.state["pages"].tensors["lowest"], store.state["pages"].tensors["lowest"])
    assert twin.state["pages"].tokens == 8
