"""What holds for every codec: errors as small as its bits allow, codes of a block alone, all bytes counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.contracts import kv_recipes
from rarefy.core.errors import FormatError, OptionError, RecipeError
from rarefy.formats.grids import IntegerGrid
from rarefy.kv.codec import Codec, apply, nbytes
from rarefy.kv.codecs import Exact, Gridded, LowRank, Partition, Permuted, ProductTable, Residual, Sparse
from rarefy.kv.plan import HeadShape, KvSamples
from rarefy.kv.side import Side
from rarefy.recipes.kv.gear import Gear
from rarefy.recipes.kv.million import Million
from rarefy.recipes.kv.turbo_quant import gaussian_table
from rarefy.solvers.kmeans import assign, kmeans
from tests.kv.coded import CHANNELS, HEADS, RECIPES, layer_codecs, samples

GRID = IntegerGrid(num_bits=4, group_size=4, zero="float")


def sides() -> dict[str, Codec]:
    order = torch.rand(HEADS, CHANNELS).argsort(-1).to(torch.int16)
    found: dict[str, Codec] = {
        "permuted": Permuted(Gridded(GRID, "token", 8, CHANNELS), order),
        "partition": Partition([Gridded(GRID, "token", 8, 4), Exact(torch.float32, 8)], [4, CHANNELS - 4]),
        "low_rank": LowRank(3, 8, CHANNELS),
        "sparse": Sparse(5, "channel", 8, CHANNELS),
    }
    for name in RECIPES:
        codecs = layer_codecs(name)
        found |= {f"{name}.keys": codecs.keys, f"{name}.values": codecs.values}
    return found


CODECS = sides()
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


def blocks(codec: Codec, count: int = 5, rows: int = 3) -> Tensor:
    return torch.randn(rows, HEADS, count, codec.tokens, CHANNELS)


@each_codec
def test_products_in_code_are_those_with_what_is_decoded(codec: Codec) -> None:
    x = blocks(codec)
    payload = codec.encode(x)
    dense = codec.decode(payload).flatten(2, 3).double()
    query, weights = torch.randn(3, HEADS, 7, CHANNELS), torch.rand(3, HEADS, 7, dense.shape[2])
    assert codec.decode(payload).shape == x.shape
    torch.testing.assert_close(codec.score(query, payload).double(), query.double() @ dense.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codec.mix(weights, payload).double(), weights.double() @ dense, rtol=1e-4, atol=1e-4)


@each_codec
def test_codes_depend_on_their_block_alone(codec: Codec) -> None:
    x = blocks(codec)
    whole = codec.encode(x)
    alone = codec.encode(x[1:2, :, 2:3])
    for name, tensor in apply(lambda tensor: tensor[1:2, :, 2:3], whole).items():
        if tensor.is_floating_point():  # sums may be taken in another order for another number of blocks
            torch.testing.assert_close(tensor, alone[name], rtol=2e-3, atol=2e-3)
        else:
            assert (tensor != alone[name]).float().mean() < 0.01, name


@each_codec
def test_zero_and_constant_blocks_are_finite(codec: Codec) -> None:
    for value in (0.0, 3.0, -1e4):
        x = torch.full((1, HEADS, 2, codec.tokens, CHANNELS), value)
        assert torch.isfinite(codec.decode(codec.encode(x))).all()


@each_codec
def test_every_stored_byte_is_counted(codec: Codec) -> None:
    payload = codec.encode(blocks(codec))
    assert nbytes(payload).total == sum(tensor.numel() * tensor.element_size() for tensor in payload.values())


@pytest.mark.parametrize(("name", "bound"), [("fp8", 0.04), ("kivi", 0.12), ("turbo_quant", 0.12), ("gear", 0.1),
                                             ("kv_quant", 0.15), ("million", 0.45), ("identity", 0.0)])  # fmt: skip
def test_errors_are_those_of_the_bits(name: str, bound: float) -> None:
    codecs = layer_codecs(name)
    for codec in (codecs.keys, codecs.values):
        x = blocks(codec, 40)
        error = (codec.decode(codec.encode(x)) - x).norm() / x.norm()
        assert error <= bound


@pytest.mark.parametrize("name", ["fp8", "kivi", "identity", "million"])
def test_what_was_decoded_is_coded_again_as_it_was(name: str) -> None:
    codecs = layer_codecs(name)
    for codec in (codecs.keys, codecs.values):
        once = codec.decode(codec.encode(blocks(codec)))
        torch.testing.assert_close(codec.decode(codec.encode(once)), once, rtol=2e-3, atol=2e-3)


def test_a_residual_never_adds_error() -> None:
    base = Gridded(GRID, "token", 8, CHANNELS)
    x = blocks(base, 20)

    def error(codec: Codec) -> float:
        return float((codec.decode(codec.encode(x)) - x).square().sum())

    low_rank, sparse = LowRank(2, 8, CHANNELS), Sparse(2, "token", 8, CHANNELS)
    assert error(Residual(base, sparse)) < error(base)
    assert error(Residual(base, sparse, low_rank)) < error(Residual(base, sparse))


def test_low_rank_captures_a_low_rank_block() -> None:
    x = torch.randn(1, HEADS, 3, 8, 2) @ torch.randn(1, HEADS, 3, 2, CHANNELS)
    codec = LowRank(2, 8, CHANNELS)
    torch.testing.assert_close(codec.decode(codec.encode(x)), x, rtol=1e-2, atol=1e-2)


def test_low_rank_of_fewer_directions_than_it_may_have() -> None:
    x = torch.randn(1, HEADS, 3, 8, 1) @ torch.randn(1, HEADS, 3, 1, CHANNELS)
    x[:, :, 1] = 0.0
    codec = LowRank(3, 8, CHANNELS)
    torch.testing.assert_close(codec.decode(codec.encode(x)), x, rtol=1e-2, atol=1e-2)


def test_gear_keeps_as_many_outliers_as_it_says() -> None:
    codecs = Gear(block=64, outliers=0.05).codecs(HeadShape(HEADS, CHANNELS, CHANNELS, torch.float32), {})
    payload = codecs.keys.encode(torch.randn(1, HEADS, 1, 64, CHANNELS))
    assert payload["1.values"].shape == (1, HEADS, 1, CHANNELS, 4)  # of 64 tokens: two at each end


def test_the_gaussian_table_has_the_known_errors() -> None:
    x = torch.randn(1 << 18)
    for num_bits, known in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):  # Max 1960, table I
        table = gaussian_table(num_bits)
        error = (x - table[torch.searchsorted((table[1:] + table[:-1]) / 2, x)]).square().mean()
        assert error.item() == pytest.approx(known, rel=0.03)


def test_kmeans_is_as_good_as_the_oracle() -> None:
    from sklearn.cluster import KMeans

    points = torch.randn(2000, 3)
    ours = assign(points, kmeans(points, 16))[1].sum().item()
    theirs = KMeans(16, n_init=3, random_state=0).fit(points.numpy()).inertia_
    assert ours < 1.08 * theirs
    few = points[:3]
    assert assign(few, kmeans(few, 8))[1].max() < 1e-5


def test_kmeans_puts_centroids_where_weight_is() -> None:
    dice = torch.Generator().manual_seed(4)
    points = torch.randn(2000, 2, generator=dice)
    weight = torch.where(points[:, 0] > 1.5, 1.0, 1e-3)
    plain, weighed = (assign(points, kmeans(points, 16, weight=mass))[1] for mass in (None, weight))
    assert (weight * weighed).sum() < 0.5 * (weight * plain).sum()
    doubled = kmeans(torch.cat([points, points[:500]]), 16, steps=60)
    twice = torch.ones(2000).index_fill(0, torch.arange(500), 2.0)
    same = kmeans(points, 16, weight=twice, steps=60)
    costs = [(twice * assign(points, found)[1]).sum().item() for found in (doubled, same)]
    assert costs[0] == pytest.approx(costs[1], rel=0.05)


def test_a_channel_that_the_loss_depends_on_is_coded_well() -> None:
    """The code that two channels share serves the one whose errors count, and it shares with one whose do not."""
    seen = samples(tokens=3000)
    weight = torch.ones_like(seen.keys)
    weight[:, :, ::2] = 400.0
    errors = []
    for counts in (weight, None):
        recipe = Million(code_bits=6, block=8, importance="equal" if counts is None else "fisher")
        params = recipe.fit(replace(seen, key_weight=counts, value_weight=counts))
        codec = recipe.codecs(HeadShape(HEADS, CHANNELS, CHANNELS, torch.float32), params).keys
        x = seen.keys.transpose(0, 1)[None].unflatten(2, (-1, 8))
        errors.append((codec.decode(codec.encode(x)) - x).square()[..., ::2].mean().item())
    assert errors[0] < 0.25 * errors[1]


def test_codebooks_of_another_model_are_refused() -> None:
    recipe = Million(code_bits=4, block=8)
    params = recipe.fit(samples())
    shape = HeadShape(HEADS, CHANNELS, CHANNELS, torch.float32)
    twice = {**params, "keys.order": params["keys.order"].clone()}
    twice["keys.order"][0, 0] = twice["keys.order"][0, 1]
    lacking = {name: tensor for name, tensor in params.items() if name != "values.weight"}
    for wrong in ({**params, "keys.codebook": params["keys.codebook"][0]}, twice, lacking):
        with pytest.raises(RecipeError, match="calibrate again"):
            recipe.codecs(shape, wrong)


@pytest.mark.parametrize(
    ("name", "options"), [("million", {"code_bits": 4, "steps": 8}), ("kv_quant", {"num_bits": 3})]
)
def test_rare_tokens_that_the_loss_depends_on_are_coded_well(name: str, options: dict[str, Any]) -> None:
    seen = samples(tokens=832)
    rare = torch.arange(832) % 40 == 3
    keys = seen.keys + 5.0 * rare[:, None, None]
    weight = torch.where(rare, 1.0, 1e-3)[:, None, None].expand_as(keys)
    errors = []
    for importance in ("fisher", "equal"):
        recipe = kv_recipes.get(name)(**options, importance=importance)
        weights = (weight, seen.value_weight) if "fisher" in recipe.needs else (None, None)
        params = recipe.fit(KvSamples(keys, seen.values, seen.places, *weights, recipe.pre_rope))
        codec = recipe.codecs(HeadShape(HEADS, CHANNELS, CHANNELS, torch.float32), params).keys
        x = keys.transpose(0, 1)[None].unflatten(2, (-1, codec.tokens))
        off = (codec.decode(codec.encode(x)) - x).flatten(2, 3)[0].transpose(0, 1)
        errors.append((weight * off.square()).sum().item())
    assert errors[0] < 0.7 * errors[1]


def test_product_codes_say_what_they_cannot_do() -> None:
    with pytest.raises(RecipeError, match="width 3 does not divide the 16 channels of a head; use one of 1, 2, 4, 8"):
        Million(width=3).fit(samples())
    with pytest.raises(FormatError, match="512 entries"):
        ProductTable(torch.zeros(1, 4, 512, 4))


def test_blocks_have_to_divide_a_segment() -> None:
    with pytest.raises(OptionError, match="A block of 24 tokens does not divide 2048"):
        Side(Exact(torch.float32, 24), 0, torch.zeros(1, 1, 0, 4), torch.zeros(1, 0, dtype=torch.bool))
