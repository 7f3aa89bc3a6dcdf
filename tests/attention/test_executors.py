"""All executors agree on all maps: with each other, with softmax in float64, and with dense attention at density 1.

The Triton kernels are held to the reference in ``tests/kernels/test_triton_blocks.py``, and fa4 on a GPU."""

from __future__ import annotations

import pytest
import torch

from rarefy.attention.block_map import BlockMap
from rarefy.attention.executors import choose, executors
from rarefy.attention.reach import Reach
from rarefy.attention.source import Plain, Stored
from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.formats.grids import IntegerGrid
from rarefy.kernels.cpu import library
from rarefy.kv.codecs import Gridded
from rarefy.kv.plan import LayerCodecs
from rarefy.kv.store import LayerStore
from tests.attention.maps import REACHES, oracle, random_map, tensors, token_mask, tokens_of

NATIVE = ("native",) if library.available() and library.instructions() != "scalar" else ()
CHANNELS = 16  # the fewest of the native library
HERE = ("reference", "cpu", "flex", *NATIVE)


def check(name: str, reach: Reach, block_map: BlockMap, softcap: float | None = None, group: int = 2) -> None:
    batch = block_map.count.shape[0]
    query, key, value = tensors(reach, batch, 2 * group, channels=CHANNELS)
    executor = executors.get(name)()
    reason = executor.refusal(query, Plain(key, value), block_map, softcap)
    if reason is not None:
        with pytest.raises(UnsupportedError, match=f"Executor '{name}' cannot run this attention: {reason[:20]}"):
            choose(name, query, Plain(key, value), block_map, softcap)
        return
    found, lse = executor.run(query, Plain(key, value), block_map, 0.3, softcap)
    seen = token_mask(reach, batch, 2 * group) & tokens_of(block_map, 2 * group)
    expected, expected_lse = oracle(query, key, value, seen, 0.3, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("executor", HERE)
@pytest.mark.parametrize("name", REACHES)
def test_executors_agree_with_the_oracle(name: str, executor: str) -> None:
    reach = REACHES[name]()
    for heads in (4, 2, 1):
        check(executor, reach, random_map(reach, 2, heads))


def column(share: int) -> torch.Tensor:
    keep = torch.zeros(1, 4, 5, 5, dtype=torch.bool)
    keep[..., share] = True
    return keep


MAPS = {
    "all": torch.ones(1, 4, 5, 5, dtype=torch.bool),
    "diagonal": torch.eye(5, dtype=torch.bool).expand(1, 4, 5, 5),
    "sink column": column(0),
    "one heavy row": torch.eye(5, dtype=torch.bool).expand(1, 4, 5, 5) | (torch.arange(5) == 4)[:, None],
    "nothing": torch.zeros(1, 4, 5, 5, dtype=torch.bool),
}


@pytest.mark.parametrize("executor", HERE)
@pytest.mark.parametrize("name", MAPS)
def test_degenerate_maps(name: str, executor: str) -> None:
    reach = Reach.last(70, 70)
    check(executor, reach, BlockMap.from_mask(MAPS[name], reach, reach.blocks(16, 16)))


@pytest.mark.parametrize("executor", HERE)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (15, 15), (17, 17), (1, 17), (2, 15), (17, 40)])
def test_every_length(queries: int, keys: int, executor: str) -> None:
    reach = Reach.last(queries, keys)
    check(executor, reach, random_map(reach, 1, 4, share=1.0))
    check(executor, reach, random_map(reach, 1, 4))


@pytest.mark.parametrize("executor", HERE)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_groups_of_heads(group: int, executor: str) -> None:
    reach = Reach.last(33, 50)
    for heads in (2, 2 * group):
        check(executor, reach, random_map(reach, 2, heads), group=group)


@pytest.mark.parametrize("executor", HERE)
def test_softcap_is_bent_or_refused(executor: str) -> None:
    reach = Reach.last(33, 50)
    check(executor, reach, random_map(reach, 2, 4), softcap=2.0)


@pytest.mark.parametrize("executor", ["reference", "cpu", *NATIVE])
def test_what_is_not_listed_is_not_read_and_what_is_shows(executor: str) -> None:
    reach = Reach.last(64, 64)
    keep = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    keep[:, :, 2:, 1] = False
    block_map = BlockMap.from_mask(keep, reach, reach.blocks(16, 16))
    query, key, value = tensors(reach, 1, 4, channels=CHANNELS)
    run = executors.get(executor)().run
    clean, _ = run(query, Plain(key, value), block_map, 0.3)
    for poison in (torch.nan, torch.inf):
        bad_key, bad_value = key.clone(), value.clone()
        bad_key[:, :, 16:32], bad_value[:, :, 16:32] = poison, poison
        found, _ = run(query, Plain(bad_key, bad_value), block_map, 0.3)
        torch.testing.assert_close(found[:, :, 32:], clean[:, :, 32:])
        assert not torch.isfinite(found[:, :, 31]).all()


@pytest.mark.parametrize("executor", HERE)
def test_large_numbers_stay_numbers(executor: str) -> None:
    reach = Reach.last(40, 40)
    query, key, value = (part * 1e4 for part in tensors(reach, 1, 4, channels=CHANNELS))
    block_map = random_map(reach, 1, 4, share=1.0)
    found, lse = executors.get(executor)().run(query, Plain(key, value), block_map, 0.3)
    assert bool(torch.isfinite(found).all()) and bool(torch.isfinite(lse).all())


@pytest.mark.parametrize("executor", HERE)
def test_products_beyond_float16_stay_numbers(executor: str) -> None:
    """Scores of half a million, where float16 ends at 65,504."""
    reach = Reach.last(40, 40)
    query, key, value = (part.half() for part in tensors(reach, 1, 4, channels=CHANNELS))
    query, key, block_map = query * 200, key * 200, random_map(reach, 1, 4, share=1.0)
    found, lse = executors.get(executor)().run(query, Plain(key, value), block_map, 1.0)
    seen = token_mask(reach, 1, 4) & tokens_of(block_map, 4)
    expected, expected_lse = oracle(query, key, value, seen, 1.0)
    assert float(expected_lse.max()) > 70_000 and bool(torch.isfinite(found).all())
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.float(), expected_lse, rtol=1e-3, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("executor", HERE)
def test_sixteen_bits(executor: str, dtype: torch.dtype) -> None:
    reach = Reach.last(70, 70)
    block_map = random_map(reach, 1, 2, share=0.6)
    query, key, value = (part.to(dtype) for part in tensors(reach, 1, 4, channels=CHANNELS))
    found, _ = executors.get(executor)().run(query, Plain(key, value), block_map, 0.3)
    seen = token_mask(reach, 1, 4) & tokens_of(block_map, 4)
    expected, _ = oracle(query, key, value, seen, 0.3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_keys_of_a_block_become_one_of_their_mean() -> None:
    """A level stands for its members, so where neighbours are equal nothing changes."""
    reach = Reach.last(70, 70)
    blocks = reach.blocks(16, 16)
    keep = torch.rand(1, 2, blocks.rows, blocks.columns) < 0.7
    level = torch.where(blocks.full, torch.randint(0, 4, keep.shape), 0).to(torch.uint8)
    block_map = BlockMap.from_mask(keep, reach, blocks, level)
    query, key, value = tensors(reach, 1, 4, channels=CHANNELS)
    key, value = (part[:, :, ::8].repeat_interleave(8, 2)[:, :, :70] for part in (key, value))
    found, lse = executors.get("reference")().run(query, Plain(key, value), block_map, 0.3)
    expected, expected_lse = oracle(query, key, value, token_mask(reach, 1, 4) & tokens_of(block_map, 4), 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)
    for name in ("cpu", "flex", "triton", *NATIVE):
        with pytest.raises(UnsupportedError, match=f"'{name}' cannot run"):
            choose(name, query, Plain(key, value), block_map)


def test_the_reference_has_gradients_and_others_say_that_they_have_none() -> None:
    reach = Reach.last(20, 20)
    block_map = random_map(reach, 1, 1, 8, 8, share=0.7)
    query, key, value = (part.double().requires_grad_() for part in tensors(reach, 1, 2, 1, 4))
    seen = token_mask(reach, 1, 2) & tokens_of(block_map, 2)

    def loss(output: torch.Tensor) -> torch.Tensor:
        return (output.double() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()

    wide = (query @ key.repeat_interleave(2, 1).mT * 0.3).masked_fill(~seen, -torch.inf)
    exact = wide.softmax(-1).nan_to_num() @ value.repeat_interleave(2, 1)
    expected = torch.autograd.grad(loss(exact), (query, key, value))
    found, _ = executors.get("reference")().run(query, Plain(key, value), block_map, 0.3)
    for one, other in zip(torch.autograd.grad(loss(found), (query, key, value)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    for name in ("cpu", "flex", *NATIVE):
        with pytest.raises(UnsupportedError, match="gradients"):
            choose(name, query, Plain(key, value), block_map)


@pytest.mark.parametrize("executor", ["reference", "cpu"])
def test_few_queries_read_from_a_store_what_is_listed(executor: str) -> None:
    """Blocks in code that nobody lists are not decoded, with padding and a tail that is not whole."""
    codec = Gridded(IntegerGrid(num_bits=8, zero="float"), "token", 4, 8)
    store = LayerStore(LayerCodecs(codec, codec))
    for count in (50, 1, 1):
        seen = store.append(torch.randn(2, 2, count, 8), torch.randn(2, 2, count, 8))
    source = Stored(seen)
    asked: list[tuple[int, int]] = []
    whole = source.keys

    def keys(start: int = 0, stop: int | None = None) -> torch.Tensor:
        asked.append((start, 52 if stop is None else stop))
        return whole(start, stop)

    reach = Reach(2, 52, 50, first=torch.tensor([0, 9]))
    blocks = reach.blocks(2, 8)
    keep = torch.zeros(2, 2, 1, blocks.columns, dtype=torch.bool)
    keep[..., [0, 3, 4, 6]] = True
    block_map = BlockMap.from_mask(keep, reach, blocks)
    query = torch.randn(2, 4, 2, 8)
    plain = Plain(source.keys(), source.values())
    shown = token_mask(reach, 2, 4) & tokens_of(block_map, 4)
    expected, expected_lse = oracle(query, plain.key, plain.value, shown, 0.3)
    source = Stored(seen)
    source.keys = keys  # type: ignore[method-assign]
    found, lse = executors.get(executor)().run(query, source, block_map, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)
    assert asked == [(0, 8), (24, 40), (48, 56)]


def test_executors_are_chosen_by_name_or_by_what_can_serve() -> None:
    reach = Reach.last(40, 40)
    query, key, value = tensors(reach, 1, 4, channels=CHANNELS)
    block_map = random_map(reach, 1, 4)
    assert choose("auto", query, Plain(key, value), block_map).name == (*NATIVE, "cpu")[0]
    assert choose("auto", query.requires_grad_(), Plain(key, value), block_map).name == "trainable"
    with pytest.raises(OptionError, match="Unknown attention executor 'flax'; did you mean 'flex'"):
        choose("flax", query, Plain(key, value), block_map)
    with pytest.raises(UnsupportedError, match="'fa4' cannot run this attention: it needs a Hopper GPU"):
        choose("fa4", query, Plain(key, value), block_map)
