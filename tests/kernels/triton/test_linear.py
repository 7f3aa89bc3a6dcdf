"""The portable kernel over execution layouts, interpreted where no GPU is."""

from __future__ import annotations

import pytest
import torch

from rarefy.kernels.cuda import layout
from rarefy.kernels.cuda.code import Code

pytest.importorskip("triton")
from rarefy.kernels.triton.linear import Tuning, fits, linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "code",
    [
        Code(4, 128, center=8), Code(4, 0, zero=torch.uint8), Code(2, 128, zero=torch.float16), Code(1, 256, center=1),
        Code(1, 256, zero=torch.float16),
        Code(8, 128, center=128, scale=torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_every_code(code: Code) -> None:
    assert fits(code)
    rows, columns, tokens = 37, 520, 3
    size = code.group or columns
    codes = torch.randint(0, 1 << code.bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, -(-columns // size)) + 0.5).to(code.scale)  # type: ignore[arg-type]
    zero = None if code.zero is None else torch.randint(0, 1 << code.bits, scale.shape).to(code.zero)
    x = torch.randn(tokens, columns).half()
    centers = code.center if zero is None else zero.double().repeat_interleave(size, 1)[:, :columns]
    weight = (codes.double() - centers) * scale.double().repeat_interleave(size, 1)[:, :columns]
    pairs = [None if each is None else layout.pack_pairs(each).to(DEVICE) for each in (scale, zero)]
    packed = layout.pack_codes(codes, code.bits, code.span, code.order).to(DEVICE)
    y = linear(code, Tuning(tiles=2, split=2), x.to(DEVICE), packed, pairs[0], pairs[1], rows)  # type: ignore[arg-type]
    expected = x.double() @ weight.T
    assert float((y.cpu().double() - expected).norm() / expected.norm()) < 1e-3
