"""Columns by the native library, with every instruction set that this processor has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rarefy.formats.grids import IntegerGrid
from rarefy.formats.scales import BilevelScale
from rarefy.kernels import columns, native
from rarefy.kernels.cpu import library
from rarefy.solvers.clip import ClipSearch, fit
from rarefy.solvers.gptq import fit_members
from rarefy.solvers.outliers import leave_one_out_gain, mean_filled
from tests.kernels.problems import SEARCHED, fit_problem, range_problem, searched_in_torch, stretch

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")


@pytest.fixture(params=library.supported() if library.available() else [])
def instructions(request: pytest.FixtureRequest) -> Any:
    with library.using(request.param):
        yield request.param


@pytest.mark.parametrize("members,rows", [(1, 1), (2, 35), (3, 16)])
@pytest.mark.parametrize("count,width", [(1, 1), (16, 128), (37, 128), (150, 300)])
@pytest.mark.parametrize("rule", columns.RULES)
def test_rounds_as_the_loop_does(
    rule: columns.Rule, count: int, width: int, members: int, rows: int, instructions: str
) -> None:
    for rounds in (True, False) if rule == "drop" else (True,):
        found, expected = (stretch(rule, members, rows, count, width, rounds=rounds) for _ in range(2))
        native.round_columns(**found)
        columns.reference(**expected)
        # Without fused products every correction has another last bit, and a code that flips changes all that follow.
        part = slice(None) if instructions != "scalar" else slice(0, 8)
        for name in ("codes", "marked", "lost", "errors", "block"):
            if expected[name] is not None:
                across = (slice(None), part) if name in ("errors", "block") else (part,)
                torch.testing.assert_close(
                    found[name][across], expected[name][across], rtol=0, atol=0 if instructions != "scalar" else 1e-6
                )


@pytest.mark.parametrize(
    "size,members,rows,tile,bits,dtype",
    [(16, 1, 48, 16, (3, 3), "float16"), (16, 3, 16, 16, (3, 3), "float16"), (7, 1, 21, 4, (5, 3), "bfloat16"),
     (32, 2, 24, 8, (4, 4), "float16"), (1, 1, 40, 16, (3, 3), "float16"), (16, 1, 9, 16, (3, 3), "float16"),
     (16, 2, 400, 16, (3, 3), "float16"), (16, 1, 150, 64, (4, 4), "float16"), (8, 2, 35, 32, (4, 2), "bfloat16")],
)  # fmt: skip
@pytest.mark.parametrize("searched", [False, True])
def test_fits_as_the_solver_does(
    size: int, members: int, rows: int, tile: int, bits: tuple[int, int], dtype: Any, searched: bool, instructions: str
) -> None:
    group, unit, mass, threshold = fit_problem(size, members, rows)
    scales = BilevelScale(scale_bits=bits[0], zero_bits=bits[1], rows=tile, dtype=dtype)
    grid = IntegerGrid(num_bits=3, group_size=size, zero="float", scales=scales)
    search = ClipSearch() if searched else None
    factors = [] if search is None else search.factors(torch.device("cpu")).tolist()
    codes, second, scale, zero = native.fit_around(
        group, unit, mass, threshold, levels=8, bits=bits, tile=tile, dtype=getattr(torch, dtype), factors=factors,
        norm=2.4,
    )  # fmt: skip
    weight = group.transpose(1, 2)
    spoils = leave_one_out_gain(weight, unit[:, None].expand_as(weight), 8) > threshold.view(members, rows, 1)
    assert size == 1 or spoils.any()
    expected = fit_members(grid, mean_filled(weight, spoils), mass, search)
    assert torch.equal(codes, expected["scale"]) and torch.equal(second, expected["second_order"])
    even = grid.even(expected)
    assert torch.equal(scale[None], even[0]) and torch.equal(zero[None], even[1])


@pytest.mark.parametrize("grid,weighted", SEARCHED)
def test_searches_ranges_as_the_loop_does(grid: IntegerGrid, weighted: bool, instructions: str) -> None:
    weight, importance = range_problem(weighted)
    found, expected = fit(grid, weight, importance, ClipSearch()), searched_in_torch(grid, weight, importance)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_op_is_well_formed() -> None:
    given = stretch("choose", 2, 20, 16, 40)
    names = "block errors shares codes scale zero groups last rule marked lost reach unit".split()
    dense = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    torch.library.opcheck(torch.ops.rarefy.round_columns.default, tuple(dense[name] for name in names))
    numbers = ([1.0, 0.9], 2.4, 8, [3, 3], 16, True)
    torch.library.opcheck(torch.ops.rarefy.fit_around.default, (*fit_problem(16, 1, 32), *numbers))
    search = (*range_problem(True), [1.0, 0.8], 2.4, 32, 8, "integer", torch.float16)
    torch.library.opcheck(torch.ops.rarefy.search_ranges.default, search)
