"""Joined weights mean what their parts mean, below each other, and lie in the same memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rarefy.formats.grids import BinaryGrid, FloatGrid, IntegerGrid, LutGrid
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms.plain import Residual
from rarefy.formats.terms.quantized import Quantized
from rarefy.kernels.cuda.join import join_
from rarefy.kernels.cuda.linear import dense_sum
from rarefy.kernels.cuda.prepared import Prepared, prepare

COLUMNS = 256
GRIDS: dict[str, Any] = {
    "int4": IntegerGrid(num_bits=4, group_size=128),
    "int3 with zeros": IntegerGrid(num_bits=3, group_size=64, zero="integer"),
    "bilevel": IntegerGrid(num_bits=3, group_size=16, zero="float", scales=BilevelScale(rows=16)),
    "lut3": LutGrid(num_bits=3, dtype="bfloat16"),
    "int8": IntegerGrid(num_bits=8, group_size=64),
    "fp8": FloatGrid(format="fp8_e4m3"),
    "fp4": FloatGrid(format="fp4", group_size=32),
    "binary": BinaryGrid(group_size=128),
}


def prepared(term: Any) -> Prepared:
    family, arguments, multiplier = term.operation()
    return prepare(family, arguments, multiplier)


def of_grid(grid: Any, rows: int) -> Prepared:
    weight = torch.randn(rows, COLUMNS)
    params = grid.fit(weight)
    return prepared(Quantized.from_codes(grid.encode(weight, params), params, grid))


def outliers(rows: int, share: float = 0.05) -> Prepared:
    weight = torch.randn(rows, COLUMNS)
    return prepared(Residual.from_weight(weight, torch.rand(rows, COLUMNS) < share))


def dense(made: Prepared) -> torch.Tensor:
    nothing = torch.empty(0)
    tensors = {name: made.tensors.get(name, nothing) for name in Prepared.SLOTS}
    return dense_sum([(tensors, made.numbers, made.multiplier)])


@pytest.mark.parametrize("name", GRIDS)
def test_codes_of_several_are_one(name: str) -> None:
    parts = [of_grid(GRIDS[name], rows) for rows in (32, 16, 24)]
    canonical = [part.canonical() for part in parts]
    wanted = torch.cat([dense(part) for part in parts])
    for _ in range(2):  # the second time they lie together already
        whole = join_(parts)
        assert whole is not None and whole.rows == 72
        assert torch.equal(dense(whole), wanted)
        assert torch.equal(torch.cat([dense(part) for part in parts]), wanted)
        assert all(part.tensors["codes"].untyped_storage().data_ptr() == whole.tensors["codes"].data_ptr()
                   for part in parts)  # fmt: skip
    for part, before in zip(parts, canonical, strict=True):
        assert all(torch.equal(now, then) if isinstance(then, torch.Tensor) else now == then
                   for now, then in zip(part.canonical(), before, strict=True))  # fmt: skip
    assert whole.canonical()[-2:] == (72, COLUMNS)


def test_outliers_of_several_are_one() -> None:
    parts = [outliers(32), outliers(16, 0.0), outliers(11, 0.2)]
    assert len({part.tensors["entries"].shape[1] for part in parts}) > 1
    canonical = [part.canonical() for part in parts]
    wanted = torch.cat([dense(part) for part in parts])
    for _ in range(2):
        whole = join_(parts)
        assert whole is not None and torch.equal(dense(whole), wanted)
        assert torch.equal(torch.cat([dense(part) for part in parts]), wanted)
    for part, before in zip(parts, canonical, strict=True):
        assert all(torch.equal(now, then) for now, then in zip(part.canonical()[:2], before[:2], strict=True))


def test_what_cannot_be_one_stays_apart() -> None:
    int4 = GRIDS["int4"]
    assert join_([of_grid(int4, 24), of_grid(int4, 16)]) is None  # a tile would have rows of both
    assert join_([of_grid(int4, 16), of_grid(IntegerGrid(num_bits=4, group_size=64), 16)]) is None
    assert join_([of_grid(int4, 16), outliers(16)]) is None
    tables = [of_grid(LutGrid(num_bits=2, rows_per_lut=None), 16) for _ in range(2)]
    assert join_(tables) is None  # each has its own
    assert join_([tables[0], tables[0]]) is not None
