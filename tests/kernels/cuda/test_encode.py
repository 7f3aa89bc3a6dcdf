"""The CUDA encoder run by this processor gives the bits of the codecs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import IntegerGrid
from rarefy.kernels.cuda import encode as kernel
from rarefy.kernels.cuda.encode_blocks import BlockCode
from rarefy.kv import encoding
from rarefy.kv.codec import Codec
from rarefy.kv.codecs import Gridded, NormTable, Permuted, ProductTable, RangeTable, Rotated
from rarefy.kv.plan import HeadShape
from rarefy.recipes.kv.gear import Gear
from rarefy.recipes.kv.turbo_quant import gaussian_table
from tests.kernels.cuda.emulation import COMPILER, encoded, encoded_blocks

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
BATCH, HEADS, TOKENS = 2, 2, 256


def numbers(channels: int, dtype: torch.dtype) -> Tensor:
    """Among them: constants, zeros, what float16 cannot hold a step of, and what lies far from zero."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, HEADS, TOKENS, channels) * torch.rand(channels).exp()
    x[0, 0, :64] = 0.25
    x[0, 1, :, 3], x[0, 1, 5] = 0.0, 0.0
    x[1, 0, :, 7] = 1000 + 1e-3 * torch.randn(TOKENS)
    x[1, 1, 70] *= 3e3
    return x.to(dtype)


@pytest.mark.parametrize(
    ("axis", "group", "block", "num_bits", "channels"),
    [
        ("channel", 32, 64, 3, 128), ("channel", 128, 256, 4, 64), ("channel", 64, 128, 8, 128),
        ("token", 64, 32, 1, 64),
        ("token", 128, 32, 3, 128), ("token", 32, 32, 2, 128),
    ],
)  # fmt: skip
def test_uniform_codes(axis: Any, group: int, block: int, num_bits: int, channels: int) -> None:
    x = numbers(channels, torch.bfloat16)
    grid = IntegerGrid(num_bits=num_bits, group_size=group, zero="float")
    expected = Gridded(grid, axis, block, channels).encode(x.float().unflatten(2, (-1, block)))
    found, faults = encoded(kernel.Code(axis, num_bits, channels, group, block), x)
    assert torch.equal(found.codes.flatten(), expected["codes"].flatten())
    assert torch.equal(found.scale.flatten(), expected["scale"].flatten())
    assert torch.equal(found.zero.flatten(), expected["zero_point"].flatten())
    assert not faults.any()


@pytest.mark.parametrize(
    ("kind", "num_bits", "rotated", "channels", "dtype"),
    [
        ("norm", 4, True, 128, torch.float16), ("norm", 3, True, 64, torch.float32),
        ("norm", 2, False, 128, torch.float32),
        ("range", 3, False, 128, torch.float16),
    ],
)  # fmt: skip
def test_tables(kind: str, num_bits: int, rotated: bool, dtype: torch.dtype, channels: int) -> None:
    x = numbers(channels, torch.float16).to(dtype)
    lut = gaussian_table(num_bits)
    inner = {"norm": NormTable, "range": RangeTable}[kind](lut, 32, channels)
    codec = Rotated(inner, channels) if rotated else inner
    expected = codec.encode(x.float().unflatten(2, (-1, 32)))
    middles, signs = (lut[1:] + lut[:-1]) / 2, codec.signs if isinstance(codec, Rotated) else None
    code = kernel.Code(kind, num_bits, channels, rotated=rotated)
    found, faults = encoded(code, x, middles=middles, lut=lut, signs=signs)
    assert torch.equal(found.codes.flatten(), expected["codes"].flatten())
    assert torch.equal(found.scale.flatten(), expected["scale"].flatten())
    assert kind == "norm" or torch.equal(found.zero.flatten(), expected["offset"].flatten())
    assert not faults.any()


@pytest.mark.parametrize("ordered", [False, True])
def test_products(ordered: bool) -> None:
    x = torch.randn(1, 2, 64, 64)
    codebook = torch.randn(x.shape[1], 32, 256, 2).half()
    codebook[:, :, 130:140] = codebook[:, :, 10:20]  # of equals the first is taken
    codebook[:, :, 20:24] = codebook[:, :, 19:20]
    codec: Codec = ProductTable(codebook, 32, weight=torch.rand(x.shape[1], 64))
    if ordered:
        codec = Permuted(codec, torch.rand(x.shape[1], 64).argsort(-1).to(torch.int16))
    expected = codec.encode(x.unflatten(2, (-1, 32)))["codes"]
    form = encoding.form_of(codec, 64, torch.device("cpu"))
    assert form is not None and isinstance(form.code, kernel.Code) and ("order" in form.tables) == ordered
    found, _ = encoded(form.code, x, **form.tables)
    assert torch.equal(found.codes.flatten(), expected.flatten())


def test_others_may_stand_in_and_faults_are_told() -> None:
    x = numbers(64, torch.float32)
    source = torch.arange(TOKENS, dtype=torch.int32).repeat(BATCH, 1)
    source[0, :3], source[1, 17] = 3, -1
    x[0, :, :3] = torch.nan
    code = kernel.Code("token", 4, 64, 64)
    found, faults = encoded(code, x, source=source)
    seen = x.gather(2, source.clamp(min=0).long()[:, None, :, None].expand_as(x))
    seen[1, :, 17] = 0
    grid = IntegerGrid(num_bits=4, group_size=64, zero="float")
    expected = Gridded(grid, "token", 32, 64).encode(seen.unflatten(2, (-1, 32)))
    assert torch.equal(found.codes.flatten(), expected["codes"].flatten()) and not faults.any()
    assert int(encoded(code, x)[1]) & kernel.NOT_FINITE
    assert encoded(code, numbers(64, torch.float32) * 1e20)[1].tolist() == [kernel.OVERFLOWS]
    assert not kernel.Code("token", 4, 96, 32).fits and not kernel.Code("channel", 4, 64, 16, 64).fits


@pytest.mark.parametrize(
    ("axis", "num_bits", "group", "block", "channels", "outliers", "rank"),
    [("channel", 2, 64, 128, 64, 0.02, 2), ("token", 4, 64, 64, 64, 0.1, 3), ("token", 3, 32, 64, 128, 0.0, 2),
     ("channel", 4, 64, 64, 64, 0.04, 0)],
)  # fmt: skip
def test_blocks_with_corrections(
    axis: Any, num_bits: int, group: int, block: int, channels: int, outliers: float, rank: int
) -> None:
    x = numbers(channels, torch.bfloat16)[:1, :, :128]
    source = torch.arange(128, dtype=torch.int32)[None]
    source[0, 70] = 71
    recipe = Gear(num_bits=num_bits, group_size=group, block=block, outliers=outliers, rank=rank)
    both = recipe.codecs(HeadShape(HEADS, channels, channels, x.dtype), {})
    codec = both.keys if axis == "channel" else both.values
    fast = encoding.form_of(codec, channels, torch.device("cpu"))
    assert fast is not None and isinstance(fast.code, BlockCode)
    expected = codec.encode(x[:, :, source[0].long()].float().unflatten(2, (-1, block)))
    found, faults = encoded_blocks(fast.code, x, source=source, **fast.tables)
    payload = encoding._blocks(found)
    assert not faults.any() and payload.keys() == expected.keys()
    for name in expected:
        assert torch.equal(payload[name], expected[name]), name
