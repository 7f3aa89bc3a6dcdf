"""The kernels of columns, run by this processor: the same bits as the loop in torch, and the fit of a solver."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import IntegerGrid
from rarefy.formats.scales import BilevelScale
from rarefy.kernels import columns
from rarefy.kernels.column_arguments import fit_arguments, round_arguments, search_arguments
from rarefy.kernels.cuda import columns as cuda
from rarefy.solvers.clip import ClipSearch
from rarefy.solvers.gptq import fit_members
from rarefy.solvers.outliers import leave_one_out_gain, mean_filled
from tests.kernels.cuda import emulation
from tests.kernels.problems import SEARCHED, fit_problem, range_problem, searched_in_torch, stretch

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="there is no C++ compiler")


def run(given: dict[str, Any]) -> None:
    """``round_columns`` by the kernel."""
    block, errors, shares = given["block"], given["errors"], given["shares"]
    macros = cuda.round_macros(given["codes"] is not None, given["rule"], True)
    library = emulation._library((*macros, "-DENTRY=rarefy_round_columns"), cuda.ROUND)
    arguments = round_arguments(
        block, errors, shares, *(given[name] for name in "codes scale zero groups last marked lost reach unit".split())
    )
    members, _, rows = errors.shape
    library.run(0, ctypes.byref(arguments), -(-rows // 32), members, 1, 32 * cuda.WARPS, cuda.SHARED)


@pytest.mark.parametrize("count,width", [(1, 1), (16, 16), (5, 30), (16, 128), (37, 128), (48, 300)])
@pytest.mark.parametrize("rule", columns.RULES)
def test_rounds_as_the_loop_does(rule: columns.Rule, count: int, width: int) -> None:
    for rounds in (True, False) if rule == "drop" else (True,):
        found, expected = (stretch(rule, 2, 35, count, width, rounds=rounds) for _ in range(2))
        run(found)
        columns.reference(**expected)
        for name in ("codes", "marked", "lost", "errors"):
            if expected[name] is not None:
                assert torch.equal(found[name], expected[name]), name
        torch.testing.assert_close(found["block"], expected["block"], rtol=1e-6, atol=1e-7)


def fit(
    group: Tensor, unit: Tensor, mass: Tensor, threshold: Tensor, search: ClipSearch | None, grid: IntegerGrid
) -> Any:
    """``fit_around`` by the kernel."""
    scales = grid.scales
    assert isinstance(scales, BilevelScale)
    factors = [] if search is None else search.factors(torch.device("cpu")).tolist()
    half, bits = scales.dtype == "float16", (scales.scale_bits, scales.zero_bits)
    found = columns.empty_fit(group, bits, scales.rows, half)
    macros = cuda.fit_macros(group.shape[1], grid.code_count, bits, scales.rows, bool(factors), half)
    library = emulation._library((*macros, "-DENTRY=rarefy_fit_around"), cuda.FIT)
    arguments = fit_arguments(group, unit, mass, threshold, factors, 2.4, half, found)
    warps = cuda.FIT_WARPS if factors else 1
    blocks = -(-group.shape[0] * group.shape[2] // 32)
    library.run(0, ctypes.byref(arguments), blocks, 1, 1, 32 * warps, 256 * warps)
    return found


@pytest.mark.parametrize(
    "size,members,rows,tile,bits,dtype",
    [(16, 1, 48, 16, (3, 3), "float16"), (16, 3, 16, 16, (3, 3), "float16"), (7, 1, 21, 4, (5, 3), "bfloat16"),
     (32, 2, 32, 8, (4, 4), "float16"), (1, 1, 40, 16, (3, 3), "float16"), (16, 1, 9, 16, (3, 3), "float16"),
     (8, 2, 35, 32, (4, 2), "bfloat16")],
)  # fmt: skip
@pytest.mark.parametrize("searched", [False, True])
def test_fits_as_the_solver_does(
    size: int, members: int, rows: int, tile: int, bits: tuple[int, int], dtype: Any, searched: bool
) -> None:
    group, unit, mass, threshold = fit_problem(size, members, rows)
    scales = BilevelScale(scale_bits=bits[0], zero_bits=bits[1], rows=tile, dtype=dtype)
    grid = IntegerGrid(num_bits=3, group_size=size, zero="float", scales=scales)
    search = ClipSearch() if searched else None
    codes, second, scale, zero = fit(group, unit, mass, threshold, search, grid)
    weight = group.transpose(1, 2)
    spoils = leave_one_out_gain(weight, unit[:, None].expand_as(weight), 8) > threshold.view(members, rows, 1)
    assert size == 1 or spoils.any()
    expected = fit_members(grid, mean_filled(weight, spoils), mass, search)
    assert torch.equal(codes, expected["scale"]) and torch.equal(second, expected["second_order"])
    even = grid.even(expected)
    assert torch.equal(scale[None], even[0]) and torch.equal(zero[None], even[1])


@pytest.mark.parametrize("grid,weighted", SEARCHED)
def test_searches_ranges_as_the_loop_does(grid: IntegerGrid, weighted: bool) -> None:
    weight, importance = range_problem(weighted)
    size, factors = grid.size(weight.shape[1]), ClipSearch().factors(torch.device("cpu")).tolist()
    found, dtype = columns.empty_search(weight, size), getattr(torch, grid.scales.dtype)
    given = search_arguments(weight, importance, factors, 2.4, size, grid.code_count, grid.zero, dtype, found)
    library = emulation._library(("-DHALF=1", "-DENTRY=rarefy_search_ranges"), cuda.SEARCH)
    rows = -(-weight.shape[0] // cuda.SEARCH_WARPS)
    library.run(0, ctypes.byref(given), found.shape[1], rows, 1, 32 * cuda.SEARCH_WARPS, 0)
    best = grid.round(grid.propose(*grid.prepare(weight, importance), found.double()))
    for name, value in searched_in_torch(grid, weight, importance).items():
        assert torch.equal(best[name], value), name


@pytest.mark.parametrize(
    "size,tile,dtype,factors", [(33, 16, 16, 0), (16, 12, 16, 0), (16, 16, 32, 0), (16, 16, 16, 129)]
)
def test_says_what_it_does_not_fit(
    size: int, tile: int, dtype: int, factors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(columns.engines, "cuda", columns.Engine(lambda: True, {}, 32))
    assert columns.fits_around(torch.device("cuda"), 16, 16, torch.float16, 20)
    asked = torch.float16 if dtype == 16 else torch.float32
    assert not columns.fits_around(torch.device("cuda"), size, tile, asked, factors)
