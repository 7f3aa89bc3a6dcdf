"""Kernels of estimators, interpreted where no GPU is: the same numbers as the estimators in torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rarefy.attention.estimators import low_bit, windowed
from rarefy.attention.estimators.low_bit import coarse_codes
from rarefy.attention.reach import Reach
from rarefy.kv.rotary import Rotary, unrotate

pytest.importorskip("triton")
from rarefy.kernels.triton.anchored_scores import anchored_scores, token_codes
from rarefy.kernels.triton.block_summaries import block_summaries
from rarefy.kernels.triton.window_shares import window_shares, window_totals

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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_q", [1, 16])
@pytest.mark.parametrize("coarse", [False, True])
def test_window_shares_are_those_in_torch(shape: tuple, block_q: int, coarse: bool) -> None:
    query, key, reach = problem(*shape)
    means = key.unfold(2, 8, 4).mean(-1)
    long = key.unfold(2, 32, 16).mean(-1) if coarse and reach.keys >= 32 else None
    expected = windowed.window_shares(
        query,
        means,
        reach,
        scaling=0.3,
        block_q=block_q,
        size=8,
        stride=4,
        coarse=None if long is None else (long, 32, 16),
    )
    given = {"scaling": 0.3, "offset": reach.offset, "first": reach.first}
    totals = window_totals(query, means, size=8, stride=4, **given)
    if long is not None:
        rough = window_totals(query, long, size=32, stride=16, more=2.0, **given)
        totals = torch.where(rough.isneginf(), totals, rough)
    same(window_shares(query, means, totals, block_q=block_q, size=8, stride=4, **given), expected)


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize(("block_k", "tile"), [(16, 32), (32, 32)])
def test_anchored_scores_are_those_in_torch(shape: tuple, block_k: int, tile: int) -> None:
    query, key, reach = problem(*shape)
    options = {"block_q": 16, "block_k": block_k, "sink": block_k, "local": 2 * block_k, "scaling": 0.3}
    expected = low_bit.anchored_scores(query, key, reach, **options)
    asked, kept = query.mean(2), key.mean(2)
    bias = torch.matmul(asked.unflatten(1, (key.shape[1], -1)), (key - kept[:, :, None]).mT).flatten(1, 2)
    found = anchored_scores(
        query, key, kept, token_codes(query, asked, 7), token_codes(key, kept, 7), bias, offset=reach.offset,
        first=reach.first, tile=tile, **options,
    )  # fmt: skip
    same(found * math.log(2), expected, 1e-3)


def test_codes_are_those_in_torch() -> None:
    x = torch.randn(2, 70, 3, 16, device=DEVICE).transpose(1, 2)
    mean = x.mean(2)
    codes, scales = token_codes(x, mean, 7)
    expected, scale = coarse_codes(x - mean[:, :, None], 4)
    assert torch.allclose(scales, scale.squeeze(-1), rtol=1e-5)
    assert float((codes != expected).float().mean()) < 0.01  # numbers half way between two


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
