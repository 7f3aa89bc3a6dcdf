"""Rounding with error feedback against the textbook, in every order and grouping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import FloatGrid, Grid, IntegerGrid, LutGrid
from rarefy.formats.scales import BilevelScale
from rarefy.solvers.clip import ClipSearch
from rarefy.solvers.feedback import BLOCK, ColumnRule, compensate
from rarefy.solvers.gptq import gptq
from rarefy.solvers.hessian import inverse_hessian
from rarefy.solvers.rtn import round_to_nearest
from rarefy.statistics import Gram
from tests.solvers.problems import eliminate, output_error, problem, stacked

GRIDS: dict[str, Grid] = {
    "int3 g16": IntegerGrid(num_bits=3, group_size=16, zero="integer"),
    "int4 g20": IntegerGrid(num_bits=4, group_size=20),
    "int3 per row": IntegerGrid(num_bits=3, zero="float"),
    "bilevel g16": IntegerGrid(num_bits=3, group_size=16, zero="float", scales=BilevelScale()),
    "k-quant like": IntegerGrid(
        num_bits=4, group_size=16, zero="float", scales=BilevelScale(scale_bits=6, zero_bits=6, rows=1, groups=4)
    ),
    "nf4 two scales": FloatGrid(format="nf4", group_size=32, two_scales=True),
    "lut3": LutGrid(num_bits=3),
    "lut4 shared": LutGrid(num_bits=4, rows_per_lut=4),
}


def naive(weight: Tensor, gram: Gram, grid: Grid, dampening: float) -> Tensor:
    """Fresh group fits, no order, one full elimination after the other."""
    fitted: dict[int, dict[str, Tensor]] = {}
    size = grid.size(weight.shape[1])
    segment = size * grid.span

    def treat(position: int, work: Tensor, inverse: Tensor) -> Tensor:
        start = position // segment * segment
        if position == start:
            fitted[start] = grid.fit(work[:, start : start + segment].float())
        part = work[:, start : start + segment].float().clone()
        params = fitted[start]
        return grid.decode(grid.encode(part, params), params)[:, position - start].double()

    return eliminate(weight, gram, dampening, treat)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("columns", [48, 150])
def test_equals_elimination(name: str, columns: int) -> None:
    grid = GRIDS[name]
    weight, _, gram = problem(24, columns)
    [[term]] = gptq([weight], inverse_hessian(gram, 0.05), grid)
    expected = naive(weight, gram, grid, 0.05)
    stored = term.decode().double()
    # A value halfway between two codes may fall either way in 32 bits, and then takes its row along.
    rows = (stored - expected).abs().amax(1) < 1e-4 * expected.abs().max()
    assert float(rows.float().mean()) >= 0.9
    assert output_error(weight, stored, gram) == pytest.approx(output_error(weight, expected, gram), rel=0.02)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("sort,static", [(False, False), (True, False), (True, True), (False, True)])
def test_loses_less_than_rounding(name: str, sort: bool, static: bool) -> None:
    grid = GRIDS[name]
    weight, _, gram = problem(32, 100)
    [[term]] = gptq([weight], inverse_hessian(gram, 0.01, sort), grid, static_groups=static)
    rounded = round_to_nearest(weight, grid).decode()
    assert output_error(weight, term.decode(), gram) < 0.8 * output_error(weight, rounded, gram)
    permuted = sort and not static
    assert term.spec.input.type == ("permuted" if permuted else "raw")


def test_a_diagonal_hessian_is_rounding_to_nearest() -> None:
    weight = torch.randn(8, 40)
    gram = Gram(40)
    gram.sum, gram.tokens = torch.diag(torch.rand(40) + 0.5) * 100, torch.tensor(100)
    grid = GRIDS["int3 g16"]
    for sort, static in ((False, False), (True, True)):
        [[term]] = gptq([weight], inverse_hessian(gram, 0.01, sort), grid, static_groups=static)
        assert torch.equal(term.decode(), round_to_nearest(weight, grid).decode())


def test_static_groups_are_those_of_rounding() -> None:
    weight, _, gram = problem(8, 70)
    grid = GRIDS["int3 g16"]
    [[term]] = gptq([weight], inverse_hessian(gram, 0.01, True), grid, static_groups=True)
    rounded = round_to_nearest(weight, grid)
    for name in ("scale", "zero_point"):
        assert torch.equal(term.get_buffer(name), rounded.get_buffer(name))


@pytest.mark.parametrize("name", ["int3 g16", "bilevel g16", "lut4 shared"])
@pytest.mark.parametrize("sort,static", [(False, False), (True, False), (True, True)])
def test_weights_of_one_input_are_solved_as_each_alone(name: str, sort: bool, static: bool) -> None:
    _, _, gram = problem(1, 64)
    weights = [problem(rows, 64, seed=rows)[0] for rows in (32, 16, 16)]
    inverse = inverse_hessian(gram, 0.01, sort)
    together = gptq(weights, inverse, GRIDS[name], static_groups=static)
    for weight, [term] in zip(weights, together, strict=True):
        [[alone]] = gptq([weight], inverse, GRIDS[name], static_groups=static)
        torch.testing.assert_close(term.decode(), alone.decode(), rtol=0, atol=1e-6)


def test_rows_that_cannot_share_a_tile_are_solved_apart() -> None:
    _, _, gram = problem(1, 64)
    weights = [problem(rows, 64, seed=rows)[0] for rows in (20, 7)]
    for weight, [term] in zip(weights, gptq(weights, inverse_hessian(gram, 0.01), GRIDS["bilevel g16"]), strict=True):
        assert term.decode().shape == weight.shape


@pytest.mark.parametrize("name", ["int3 g16", "bilevel g16", "lut3"])
@pytest.mark.parametrize("sort,static", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("rows", [16, 10])
def test_experts_are_solved_as_each_alone(name: str, sort: bool, static: bool, rows: int) -> None:
    weight, gram = stacked(rows, 48, 3)
    inverse = inverse_hessian(gram, 0.01, sort)
    [[term]] = gptq([weight], inverse, GRIDS[name], static_groups=static)
    assert term.decode().shape == weight.shape
    for index in range(3):
        [[alone]] = gptq([weight[index]], inverse.member(index), GRIDS[name], static_groups=static)
        torch.testing.assert_close(term.decode()[index], alone.decode(), rtol=0, atol=1e-6)


def test_weights_outside_16_bit_range_keep_their_precision() -> None:
    weight, _, gram = problem(8, 32)
    inverse = inverse_hessian(gram, 0.01)
    [[plain]] = gptq([weight], inverse, GRIDS["int3 g16"])
    [[large]] = gptq([weight * 2.0**30], inverse, GRIDS["int3 g16"])
    assert large.has_multiplier
    torch.testing.assert_close(large.decode() / 2.0**30, plain.decode(), rtol=2e-3, atol=1e-5)


def test_search_counts_columns_by_their_input() -> None:
    weight, _, gram = problem(16, 64)
    weight[:, 1] *= 8  # a large weight that meets a quiet input
    inverse = inverse_hessian(gram, 0.01)
    [[plain]] = gptq([weight], inverse, GRIDS["int3 g16"])
    [[searched]] = gptq([weight], inverse, GRIDS["int3 g16"], search=ClipSearch())
    assert output_error(weight, searched.decode(), gram) < output_error(weight, plain.decode(), gram)


class Watch(ColumnRule):
    """Keeps everything and notes what it was shown."""

    def __init__(self, *segments: int) -> None:
        self.segments = segments
        self.seen: list[tuple[int, int, int]] = []
        self.shown: list[Tensor] = []
        self.met: list[Tensor] = []

    def begin(self, size: int, columns: Tensor, start: int) -> None:
        self.seen.append((size, start, columns.shape[1]))
        self.shown += [columns[0, index].clone() for index in range(columns.shape[1])] if size == max(
            self.segments
        ) else []

    def column(self, values: Tensor, position: int, error: Tensor) -> None:
        self.met.append(values[0].clone())
        torch.sub(values, values.round(), out=error)


@pytest.mark.parametrize("segments", [(4,), (64, 4), (48,), (100, 4), (3 * BLOCK, 4), (200, 7), (1,)])
def test_segments_begin_with_columns_that_are_up_to_date(segments: tuple[int, ...]) -> None:
    columns = 300
    weight, _, gram = problem(3, columns, tokens=600)
    weight *= 40
    inverse = inverse_hessian(gram, 0.01)
    rule = Watch(*segments)
    compensate(weight[None], inverse, rule)
    for size in segments:
        begun = [(start, count) for own, start, count in rule.seen if own == size]
        assert begun == [(start, min(size, columns - start)) for start in range(0, columns, size)]
    # The first column of a segment is as it is treated, whatever columns before it lost.
    for start in range(0, columns, max(segments)):
        assert torch.equal(rule.shown[start], rule.met[start])
