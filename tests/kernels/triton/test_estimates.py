"""Kernels of estimators, interpreted where no GPU is: the same numbers as the estimators in torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rarefy.attention import pooling
from rarefy.attention.estimators import low_bit, windowed
from rarefy.attention.estimators.low_bit import coarse_codes
from rarefy.attention.reach import Reach
from rarefy.kv.rotary import Rotary, unrotate

pytest.importorskip("triton")
from rarefy.kernels.triton.anchored_scores import Tile, anchored_scores, key_codes, query_codes
from rarefy.kernels.triton.block_means import block_means
from rarefy.kernels.triton.block_summaries import block_summaries
from rarefy.kernels.triton.window_shares import block_scores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Batch, query heads, KV heads, queries, keys, first tokens that are no padding.
SHAPES = [
    (1, 4, 2, 75, 75, None),
    (2, 2, 2, 40, 90, [0, 13]),
    (1, 4, 1, 33, 60, None),
    (1, 2, 1, 1, 20, None),
]


def problem(batch: int, heads: int, kv_heads: int, queries: int, keys: int, first: list[int] | None) -> tuple:
    """Queries and keys as models have them, views of ``[B, T, H, D]``, and what is seen."""
    query, key = (
        torch.randn(batch, n, h, 16, device=DEVICE).transpose(1, 2) for n, h in ((queries, heads), (keys, kv_heads))
    )
    start = None if first is None else torch.tensor(first, device=DEVICE)
    return query + 0.3, key - 0.5, Reach(queries, keys, keys - queries, first=start)


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert torch.equal(found.isneginf(), expected.isneginf())
    real = ~expected.isneginf()
    assert torch.allclose(found[real], expected[real], atol=tolerance)


@pytest.mark.parametrize(("tokens", "block", "rows"), [(70, 16, 1), (64, 16, 2), (5, 8, 1), (33, 12, 2)])
def test_summaries_are_those_of_tokens_before_rotary_embedding(tokens: int, block: int, rows: int) -> None:
    x = torch.randn(2, tokens, 3, 12, device=DEVICE).transpose(1, 2)
    places = torch.arange(tokens, device=DEVICE) + torch.arange(rows, device=DEVICE)[:, None] * 7
    cos, sin = Rotary(torch.rand(6, device=DEVICE), 1.2).angles(places)
    before, missing = unrotate(x, cos[:, None], sin[:, None]), -tokens % block
    tiles = torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, block))
    cos, sin = (torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in (cos, sin))
    for kinds in (("max", "min", "mean"), ("mean",), ("min", "max")):
        found = block_summaries(tiles, cos, sin, kinds, tokens)
        for i, part in enumerate(before.split(block, 2)):
            pools = {"max": part.amax(2), "min": part.amin(2), "mean": part.mean(2)}
            assert torch.allclose(found[:, :, i], torch.cat([pools[kind] for kind in kinds], -1), atol=1e-5)


@pytest.mark.parametrize(("span", "apart", "channels"), [(16, 16, 24), (12, 12, 16), (16, 8, 16), (1, 1, 8)])
def test_means_of_blocks_are_those_in_torch(span: int, apart: int, channels: int) -> None:
    x = torch.randn(2, 70, 3, channels, device=DEVICE).transpose(1, 2) + 0.2
    x[0, 1, :16] = 0.0
    blocks = x.unfold(2, span, apart).transpose(-1, -2)
    found, alike = block_means(blocks, likeness=True)
    assert torch.allclose(found, blocks.mean(3), atol=1e-6)
    assert torch.allclose(alike, pooling.similarity(blocks, None), atol=1e-6)
    half, _ = block_means(blocks.half())
    assert half.dtype == torch.float16 and torch.allclose(half.float(), found, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("block_q", "every"), [(1, 1), (16, 1), (16, 3)])
@pytest.mark.parametrize("coarse", [False, True])
def test_window_shares_are_those_in_torch(shape: tuple, block_q: int, every: int, coarse: bool) -> None:
    query, key, reach = problem(*shape)
    means = key.unfold(2, 8, 4).mean(-1)
    long = key.unfold(2, 32, 16).mean(-1) if coarse and reach.keys >= 32 else None
    rough = None if long is None else (long.cpu(), 32, 16)
    given = {"scaling": 0.3, "block_q": block_q, "size": 8, "stride": 4, "every": every}
    host = [tensor.cpu() for tensor in (query, means)]
    expected = windowed.window_shares(*host, reach_on_host(reach), coarse=rough, **given).to(DEVICE)
    rough = None if long is None else (long, 32, 16)
    same(windowed._by_kernel(query, means, reach, coarse=rough, **given), expected)


@pytest.mark.parametrize(("block", "size", "stride"), [(64, 32, 16), (8, 4, 2), (8, 8, 8), (16, 4, 4)])
def test_scores_of_blocks_are_those_in_torch(block: int, size: int, stride: int) -> None:
    for windows in (1, 5, 11):
        unseen = torch.arange(windows, device=DEVICE) > 7
        shares = torch.rand(2, 3, windows, device=DEVICE).masked_fill(unseen, -math.inf)
        expected = windowed.windows_to_blocks(shares, 4, block, size, stride).clamp(min=0).log()
        same(block_scores(shares, 4, size=size, stride=stride, block_k=block), expected)


def test_heads_that_do_not_fit_into_one_product_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.kernels.triton import window_shares as kernel

    monkeypatch.setattr(kernel, "MOST", 32)
    query, key, reach = problem(1, 6, 2, 40, 40, None)
    means = key.unfold(2, 8, 4).mean(-1)
    given = {"scaling": 0.3, "block_q": 16, "size": 8, "stride": 4}
    expected = windowed.window_shares(query.cpu(), means.cpu(), reach_on_host(reach), **given).to(DEVICE)
    same(windowed._by_kernel(query, means, reach, **given), expected)


# Queries of a block, every so many-th of which is looked at, keys of a block, keys and queries of a tile.
@pytest.mark.parametrize("shape", [*SHAPES[:3], (2, 2, 1, 130, 130, [0, 100])])
@pytest.mark.parametrize(
    ("sizes", "smooth", "kind"),
    [
        ((16, 1, 16, 32, 32), True, torch.int8),
        ((16, 1, 16, 32, 32), True, torch.float16),
        ((32, 2, 32, 32, 16), False, torch.int8),
    ],
)
def test_anchored_scores_are_those_in_torch(shape: tuple, sizes: tuple, smooth: bool, kind: torch.dtype) -> None:
    query, key, reach = problem(*shape)
    block_q, every, block_k, keys, rows = sizes
    options = {
        "block_q": block_q, "block_k": block_k, "sink": block_k, "local": 2 * block_k, "scaling": 0.3, "every": every,
    }  # fmt: skip
    host = [tensor.cpu() for tensor in (query, key)]
    expected = low_bit.anchored_scores(*host, reach_on_host(reach), smooth=smooth, **options).to(DEVICE)
    asked, kept = query.mean(2), key.mean(2)
    found = anchored_scores(
        query, key, asked if smooth else None, kept if smooth else torch.zeros_like(kept), most=7, offset=reach.offset,
        first=reach.first, tile=Tile(rows, keys, 4, 2), dtype=kind, **options,
    )  # fmt: skip
    same(found, expected, 1e-3 if kind == torch.int8 else 1e-2)


@pytest.mark.parametrize("kind", [torch.int8, torch.float16])
def test_queries_that_are_nearly_their_mean_are_no_more_than_it(kind: torch.dtype) -> None:
    """What queries share is exact, whatever is left of them."""
    query, key, reach = problem(1, 2, 1, 64, 64, None)
    query = 20.0 + 1e-4 * query
    options = {"block_q": 16, "block_k": 16, "sink": 16, "local": 16, "scaling": 0.3}
    expected = low_bit.anchored_scores(query.cpu(), key.cpu(), reach, num_bits=None, **options).to(DEVICE)
    found = anchored_scores(
        query, key, query.mean(2), key.mean(2), most=7, offset=0, tile=Tile(32, 32, 4, 2), dtype=kind, **options
    )
    same(found, expected, 0.02 * float(expected[expected > -math.inf].std()))


def test_codes_are_those_in_torch() -> None:
    query, key, _ = problem(2, 6, 3, 70, 70, None)
    asked, kept = query.mean(2), key.mean(2)
    codes, scales, bias = key_codes(key, kept, asked, most=7, block_k=32, width=128)
    moved = key - kept[:, :, None]
    expected, scale = coarse_codes(moved, 4, 32)
    assert torch.allclose(scales[..., :3], scale[:, :, ::32, 0], rtol=1e-5)
    assert float((codes[:, :, :70, :16] != expected).float().mean()) < 0.01  # numbers half way between two
    assert not bool(codes[:, :, 70:].any() | codes[..., 16:].any())
    added = torch.matmul(asked.unflatten(1, (3, 2)), moved.mT).flatten(1, 2)
    greatest = asked.abs().amax(-1, keepdim=True)
    assert torch.allclose(bias[..., :70] * scale.squeeze(-1).repeat_interleave(2, 1) * greatest, added, atol=1e-5)
    codes, scales, shifts, _ = query_codes(
        query, key, asked, kept, most=7, block_q=16, block_k=16, rows=16, lines=6, every=1, sink=16, local=16,
        scaling=0.3, offset=0,
    )  # fmt: skip
    # Rows of the last block lie at its end.
    taken = torch.cat([torch.arange(64), torch.arange(74, 80)]).to(DEVICE)
    expected, scale = coarse_codes(query - asked[:, :, None], 4)
    assert torch.allclose(scales[..., taken], scale.squeeze(-1), rtol=1e-5)
    assert torch.allclose((scales * shifts)[..., taken], greatest.expand(-1, -1, 70), rtol=1e-5)
    assert float((codes[:, :, taken, :16] != expected).float().mean()) < 0.01


@pytest.mark.parametrize("first", [None, [0, 50]])
def test_sums_from_longer_windows_are_those_in_torch_behind_padding_too(first: list[int] | None) -> None:
    query, key, reach = problem(2, 4, 2, 100, 100, first)
    means, long = (key.unfold(2, size, size // 2).mean(-1) for size in (8, 32))
    given = {"scaling": 0.3, "block_q": 16, "size": 8, "stride": 4}
    found = windowed._by_kernel(query, means, reach, coarse=(long, 32, 16), **given).cpu()
    host = [tensor.cpu() for tensor in (query, means, long)]
    expected = windowed.window_shares(*host[:2], reach_on_host(reach), coarse=(host[2], 32, 16), **given)
    same(found, expected)


def reach_on_host(reach: Reach) -> Reach:
    return Reach(reach.queries, reach.keys, reach.offset, first=None if reach.first is None else reach.first.cpu())
