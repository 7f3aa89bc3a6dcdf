"""The CUDA decode kernel run by this processor, against attention over what codecs decode."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import IntegerGrid
from rarefy.kernels.coded import Tiles
from rarefy.kernels.cuda import attend
from rarefy.kv.codecs import Gridded, NormTable, ProductTable, RangeTable
from rarefy.recipes.kv.turbo_quant import gaussian_table
from tests.kernels.cuda.emulation import COMPILER, attention

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

BATCH, HEADS, CHANNELS, TOKENS, RUN = 2, 2, 128, 512, 256
SCALING = 0.09


def coded(kind: str, num_bits: int, group: int, x: Tensor) -> tuple[Tiles, Tensor]:
    """``x [B, H, T, D]`` in runs of 256 tokens as the kernel takes them, and what they decode to."""
    lut = gaussian_table(min(num_bits, 4))
    grid = IntegerGrid(num_bits=num_bits, group_size=group, zero="float")
    codec: Any = {
        "channel": lambda: Gridded(grid, "channel", 128, CHANNELS),
        "token": lambda: Gridded(grid, "token", 32, CHANNELS),
        "norm": lambda: NormTable(lut, 32, CHANNELS),
        "range": lambda: RangeTable(lut / lut.max(), 32, CHANNELS),
        "product": lambda: ProductTable(torch.randn(64, 256, 2).half(), 32),
    }[kind]()
    names = ("codes", *{"norm": ("scale",), "range": ("scale", "offset"), "product": ()}.get(kind, ("scale", "zero_point")))
    payloads = [codec.encode(part.unflatten(2, (-1, codec.tokens))) for part in x.split(RUN, 2)]
    runs = tuple(tuple(payload[name].contiguous() for name in names) for payload in payloads)
    decoded = torch.cat([codec.decode(payload).flatten(2, 3) for payload in payloads], 2)
    if kind in ("channel", "token"):
        return Tiles(kind, runs, num_bits, codec.tokens, group), decoded
    if kind == "product":
        return Tiles("product", runs, num_bits, codec.tokens, 1, codec.codebook), decoded
    return Tiles("table", runs, num_bits, codec.tokens, 1, codec.lut), decoded


def oracle(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // HEADS
    keys, values = (tensor.double().repeat_interleave(group, 1) for tensor in (keys, values))
    scores = (query.double()[:, :, None] @ keys.mT)[:, :, 0] * SCALING
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return (scores.softmax(-1)[:, :, None] @ values)[:, :, 0].float(), scores.logsumexp(-1).float()


@pytest.mark.parametrize(
    ("keys", "values", "num_bits", "group"),
    [
        ("channel", "token", 4, 128), ("channel", "token", 3, 128), ("channel", "token", 2, 128),
        ("channel", "token", 8, 128), ("channel", "token", 4, 64), ("channel", "token", 4, 32),
        ("channel", "token", 3, 32), ("channel", "token", 8, 32), ("token", "token", 4, 128),
        ("token", "token", 3, 128), ("token", "token", 2, 128), ("token", "token", 8, 128), ("norm", "norm", 4, 0),
        ("norm", "norm", 3, 0), ("range", "range", 4, 0), ("norm", "range", 3, 0), ("range", "norm", 2, 0),
        ("product", "product", 8, 0), ("norm", "token", 4, 128),
    ],
)  # fmt: skip
def test_the_kernel_is_attention_over_what_is_decoded(keys: str, values: str, num_bits: int, group: int) -> None:
    torch.manual_seed(0)
    k, dense_k = coded(keys, num_bits, group or 128, torch.randn(BATCH, HEADS, TOKENS, CHANNELS) + 0.5)
    v, dense_v = coded(values, num_bits, group or 128, torch.randn(BATCH, HEADS, TOKENS, CHANNELS))
    query = torch.randn(BATCH, HEADS * 3, CHANNELS)
    hidden = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    hidden[0, 131] = hidden[1, 0] = True
    found, lse = attention(
        k, v, query, SCALING, RUN, sinks=torch.tensor([[131, -1], [0, -1]]), splits=2,
        shape=attend.Shape(warps=1, depth=4),
    )  # fmt: skip
    expected, expected_lse = oracle(query, dense_k, dense_v, hidden)
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-3, atol=4e-3)


def test_blocks_and_warps_may_find_nothing() -> None:
    """More warps than tiles, and a tile beyond what memory holds of the run before it."""
    k, dense_k = coded("token", 4, 128, torch.randn(BATCH, HEADS, TOKENS, CHANNELS))
    v, dense_v = coded("norm", 4, 128, torch.randn(BATCH, HEADS, TOKENS, CHANNELS))
    k, v = (Tiles(**{**vars(side), "spans": ((128, RUN), (128, RUN))}) for side in (k, v))
    query = torch.randn(BATCH, HEADS, CHANNELS)
    found, lse = attention(k, v, query.bfloat16(), SCALING, 128, splits=2, shape=attend.Shape(warps=3, depth=8))
    seen = [torch.cat([each[:, :, 128:256], each[:, :, 384:]], 2) for each in (dense_k, dense_v)]
    expected, expected_lse = oracle(query.bfloat16().float(), *seen, torch.zeros(BATCH, 256, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-3, atol=4e-3)


def test_what_does_not_fit_is_refused() -> None:
    k, _ = coded("token", 4, 128, torch.randn(BATCH, HEADS, TOKENS, CHANNELS))
    assert not attend.fits(k, k, 64, RUN, 1) and not attend.fits(k, k, CHANNELS, 96, 1)
    assert not attend.fits(k, Tiles("dense", k.runs), CHANNELS, RUN, 1)
    assert attend.fits(k, k, CHANNELS, RUN, 8) and not attend.fits(k, k, CHANNELS, RUN, 16)
