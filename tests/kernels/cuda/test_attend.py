"""The CUDA decode kernel run by this processor, against attention over what codecs decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import IntegerGrid
from rarefy.kernels.coded import Tiles
from rarefy.kernels.cuda import attend
from rarefy.kv.codecs import Gridded, NormTable, ProductTable, RangeTable, Rotated
from rarefy.recipes.kv.turbo_quant import gaussian_table
from tests.kernels.cuda.emulation import COMPILER, attention

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

BATCH, HEADS, CHANNELS = 2, 2, 128
SCALING = 0.09


def coded(kind: str, num_bits: int, group: int, x: Tensor, lengths: list[int]) -> tuple[Tiles, Tensor]:
    """``x [B, H, T, D]`` in runs of so many tokens as the kernel takes them, and what they decode to."""
    lut = gaussian_table(min(num_bits, 4))
    grid = IntegerGrid(num_bits=num_bits, group_size=group or 128, zero="float")
    codec: Any = {
        "channel": lambda: Gridded(grid, "channel", 128, CHANNELS),
        "token": lambda: Gridded(grid, "token", 32, CHANNELS),
        "norm": lambda: NormTable(lut, 32, CHANNELS),
        "range": lambda: RangeTable(lut / lut.max(), 32, CHANNELS),
        "product": lambda: ProductTable(torch.randn(HEADS, 64, 256, 2).half(), 32),
    }[kind]()
    more = {"norm": ("scale",), "range": ("scale", "offset"), "product": ()}.get(kind, ("scale", "zero_point"))
    payloads = [codec.encode(part.unflatten(2, (-1, codec.tokens))) for part in x.split(lengths, 2)]
    runs = tuple(tuple(payload[name].contiguous() for name in ("codes", *more)) for payload in payloads)
    decoded = torch.cat([codec.decode(payload).flatten(2, 3) for payload in payloads], 2)
    if kind in ("channel", "token"):
        return Tiles(kind, runs, num_bits, codec.tokens, group or 128), decoded
    return Tiles(
        "product" if kind == "product" else "table", runs, num_bits, codec.tokens, 1,
        codec.codebook if kind == "product" else codec.lut,
    ), decoded  # fmt: skip


def oracle(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // HEADS
    keys, values = (tensor.double().repeat_interleave(group, 1) for tensor in (keys, values))
    scores = (query.double()[:, :, None] @ keys.mT)[:, :, 0] * SCALING
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return (scores.softmax(-1)[:, :, None] @ values)[:, :, 0].float(), scores.logsumexp(-1).float()


@pytest.mark.parametrize(
    ("keys", "values", "num_bits", "group", "tile"),
    [
        ("channel", "token", 4, 128, 128), ("channel", "token", 3, 128, 128), ("channel", "token", 2, 64, 128),
        ("channel", "token", 8, 32, 128), ("token", "token", 3, 128, 64), ("token", "token", 4, 128, 128),
        ("norm", "norm", 4, 0, 128), ("norm", "range", 3, 0, 64), ("range", "norm", 2, 0, 128),
        ("product", "product", 8, 0, 128), ("product", "product", 8, 0, 64),
    ],
)  # fmt: skip
def test_the_kernel_is_attention_over_what_is_decoded(
    keys: str, values: str, num_bits: int, group: int, tile: int
) -> None:
    torch.manual_seed(0)
    lengths = [256, 256, 128], [256, 256, 64, 32]
    x = torch.randn(2, BATCH, HEADS, 645, CHANNELS).bfloat16()
    x[0] += 0.5
    k, dense_k = coded(keys, num_bits, group, x[0, :, :, :640].float(), lengths[0])
    v, dense_v = coded(values, num_bits, group, x[1, :, :, :608].float(), lengths[1])
    query = torch.randn(BATCH, HEADS * 3, CHANNELS)
    sinks = torch.tensor([[131, -1], [0, 620]])
    hidden = torch.zeros(BATCH, 645 + 2, dtype=torch.bool)
    hidden[0, [131, 646]] = hidden[1, [0, 620]] = True
    sink = torch.randn(2, BATCH, HEADS, 2, CHANNELS).bfloat16()
    exact = attend.Exact(x[0, :, :, 640:].contiguous(), x[1, :, :, 608:].contiguous(), sink[0], sink[1])
    whole = attend.CodedAttention(
        k, v, lengths, BATCH, HEADS, HEADS * 3, device=query.device, sinks=sinks, splits=2,
        shape=attend.Shape(warps=1, depth=4, tile=tile),
    )  # fmt: skip
    found, lse = attention(whole, query, SCALING, exact)
    all_k, all_v = torch.cat([dense_k, exact.keys, sink[0]], 2), torch.cat([dense_v, exact.values, sink[1]], 2)
    expected, expected_lse = oracle(query, all_k, all_v, hidden)
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("tokens", [0, 64, 256])
def test_rotated_codes_meet_exact_tokens(tokens: int) -> None:
    """Also without a tile, or without anything in code, and with more warps than work."""
    torch.manual_seed(0)
    lengths = [tokens] * (tokens > 0)
    turns = [Rotated(NormTable(gaussian_table(4), 32, CHANNELS), CHANNELS, seed) for seed in (0, 1)]
    x = torch.randn(2, BATCH, HEADS, tokens + 7, CHANNELS)
    sides, dense = [], []
    for own, turn in zip(x, turns, strict=True):
        tiles, decoded = coded("norm", 4, 0, turn.turn(own[:, :, :tokens]), lengths) if tokens else (
            Tiles("table", (), 4, 32, 1, gaussian_table(4)), own[:, :, :0]
        )  # fmt: skip
        sides.append(tiles)
        dense.append(torch.cat([turn.back(decoded), own[:, :, tokens:]], 2))
    query = torch.randn(BATCH, HEADS, CHANNELS)
    whole = attend.CodedAttention(
        sides[0], sides[1], (lengths, lengths), BATCH, HEADS, HEADS, device=query.device, splits=2,
        signs=(turns[0].signs, turns[1].signs), shape=attend.Shape(warps=3, depth=8),
    )  # fmt: skip
    exact = attend.Exact(*(own[:, :, tokens:].contiguous() for own in x))
    found, lse = attention(whole, query, SCALING, exact)
    expected, expected_lse = oracle(query, dense[0], dense[1], torch.zeros(BATCH, tokens + 7, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-3, atol=4e-3)


def test_what_does_not_fit_is_refused() -> None:
    k, _ = coded("token", 4, 128, torch.randn(BATCH, HEADS, 64, CHANNELS), [64])
    assert not attend.fits(k, k, 64, 1) and not attend.fits(k, Tiles("dense", k.runs), CHANNELS, 1)
    assert attend.fits(k, k, CHANNELS, 8) and not attend.fits(k, k, CHANNELS, 16)
