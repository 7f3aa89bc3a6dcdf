"""Round to nearest against the formula written in NumPy, at every range of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rarefy.core.errors import FormatError
from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LevelGrid, LutGrid
from rarefy.formats.scales import BilevelScale, SingleScale
from rarefy.formats.terms import Quantized, Term
from rarefy.solvers.clip import ClipSearch, fit
from rarefy.solvers.rtn import range_multiplier, relative_error, round_to_nearest

GRIDS: dict[str, Grid] = {
    "int4": IntegerGrid(num_bits=4, group_size=16, zero="integer"),
    "int3-symmetric": IntegerGrid(num_bits=3, group_size=16),
    "int3-float": IntegerGrid(num_bits=3, group_size=16, zero="float"),
    "nf4": FloatGrid(format="nf4", group_size=16),
    "fp4-two": FloatGrid(format="fp4", group_size=16, two_scales=True),
    "e4m3": FloatGrid(format="fp8_e4m3", group_size=16),
    "e5m2": FloatGrid(format="fp8_e5m2", group_size=16),
    "ternary": LevelGrid(levels=3, group_size=16),
    "five": LevelGrid(levels=5, group_size=16),
    "lut": LutGrid(num_bits=4),
    "binary": BinaryGrid(regions=2, group_size=16),
    "bilevel": IntegerGrid(num_bits=4, group_size=16, zero="float", scales=BilevelScale()),
}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def numpy_round_to_nearest(weight: np.ndarray, bits: int, group: int, kind: str) -> np.ndarray:
    """The textbook formula, group by group, with scales rounded to float16."""
    result, top = np.empty_like(weight, dtype=np.float64), np.float32(2**bits - 1)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            w = weight[row, start : start + group]
            if w.min() == w.max():  # a group of equal values is exact up to its scale
                result[row, start : start + group] = np.sign(w) * np.float16(np.abs(w))
                continue
            low, high = min(w.min(), np.float32(0)), max(w.max(), np.float32(0))
            if kind == "symmetric":
                step, zero = np.abs(w).max() * np.float32(2 / (2**bits - 1)), 2.0 ** (bits - 1)
            else:
                step = (high - low) / top
                zero = np.round(-low / step)
            scale = float(np.float16(step))
            codes = np.clip(np.round(w / scale + zero), 0, top)
            result[row, start : start + group] = (codes - zero) * scale
    return result


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (3, 16), (8, 7), (2, 33), (5, 50)])
def test_against_numpy(bits: int, group: int, kind: str) -> None:
    weight = torch.randn(9, 50)
    grid = IntegerGrid(num_bits=bits, group_size=group, zero="none" if kind == "symmetric" else "integer")
    values = round_to_nearest(weight, grid).decode().numpy()
    expected = numpy_round_to_nearest(weight.numpy(), bits, group, kind)
    # A weight half-way between two codes in float64 may fall to either side in float32.
    step = np.abs(values - expected) / np.abs(expected).max()
    assert (step > 1e-5).mean() < 0.005
    assert np.abs(weight.numpy() - values).mean() == pytest.approx(np.abs(weight.numpy() - expected).mean(), rel=1e-3)


@grids
def test_every_weight_takes_the_nearest_value(grid: Grid) -> None:
    """No other code of its group would lie closer."""
    weight = torch.randn(8, 40)
    params = grid.fit(weight)
    codes = grid.encode(weight, params)
    best = (weight - grid.decode(codes, params)).abs()
    for code in range(grid.code_count):
        other = (weight - grid.decode(torch.full_like(codes, code), params)).abs()
        assert (best <= other + 1e-6 * weight.abs().max()).all()
    if range_multiplier(weight, grid) is None:
        assert torch.equal(round_to_nearest(weight, grid).decode(), grid.decode(codes, params))


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e-3, 1.0, 1e3, 1e5, 1e15])
@grids
def test_any_range_of_weights(grid: Grid, factor: float) -> None:
    """Scales are stored in 16 bits, yet tiny and huge weights keep the precision of ordinary ones."""
    weight = torch.randn(8, 48)
    ordinary = relative_error(weight, [round_to_nearest(weight, grid)])
    term = round_to_nearest(weight * factor, grid)
    term.check()
    assert torch.isfinite(term.decode()).all()
    assert relative_error(weight * factor, [term]) <= ordinary * 1.1 + 1e-3
    x = torch.randn(3, 48)
    wanted = x @ term.decode().T
    assert torch.allclose(term(x), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@grids
def test_groups_much_smaller_than_the_largest(grid: Grid) -> None:
    weight = torch.randn(8, 48)
    weight[:4] *= 1e-2
    whole = round_to_nearest(weight, grid)
    small = relative_error(weight[:4], [round_to_nearest(weight[:4], grid)])
    if isinstance(getattr(grid, "scales", None), BilevelScale):
        return  # rows share the second order on purpose
    assert relative_error(weight[:4], [_rows(whole, 4)]) <= small * 1.1 + 2e-3


def _rows(term: Term, count: int) -> Term:
    class Top(torch.nn.Module):
        def decode(self) -> Tensor:
            return term.decode()[:count]

    return Top()  # type: ignore[return-value]


def test_the_multiplier_is_a_power_of_two_and_only_where_needed() -> None:
    grid, weight = GRIDS["int4"], torch.randn(4, 16)
    assert range_multiplier(weight, grid) is None
    assert range_multiplier(torch.zeros(4, 16), grid) is None
    assert range_multiplier(torch.empty(0, 16), grid) is None
    for factor in (1e-6, 1e5):
        multiplier = range_multiplier(weight * factor, grid)
        assert multiplier is not None and np.log2(multiplier) == int(np.log2(multiplier))
        term = round_to_nearest(weight * factor, grid)
        assert isinstance(term, Quantized) and float(term.get_buffer("multiplier")) == multiplier
    wide = IntegerGrid(num_bits=4, group_size=16, scales=SingleScale(dtype="float32"))
    assert range_multiplier(weight * 1e-6, wide) is None


@grids
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (5, 1), (3, 17)])
def test_odd_shapes(grid: Grid, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    term = round_to_nearest(weight, grid)
    assert term.shape == shape and torch.isfinite(term.decode()).all()
    assert relative_error(weight, [term]) < 1.01


@grids
def test_constant_and_zero_weights(grid: Grid) -> None:
    assert torch.equal(round_to_nearest(torch.zeros(3, 32), grid).decode(), torch.zeros(3, 32))
    for value in (0.37, -0.37):
        error = relative_error(torch.full((3, 32), value), [round_to_nearest(torch.full((3, 32), value), grid)])
        assert error < 2e-3


@grids
def test_experts_are_stacked(grid: Grid) -> None:
    weight = torch.randn(3, 8, 48) * torch.tensor([1.0, 1e-6, 1e5])[:, None, None]
    term = round_to_nearest(weight, grid)
    assert term.shape == (3, 8, 48)
    for index in range(3):
        assert torch.equal(term.decode()[index], round_to_nearest(weight[index], grid).decode())
        assert torch.equal(term.select(index).decode(), term.decode()[index])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@grids
def test_what_is_no_number_is_refused(grid: Grid, value: float) -> None:
    weight = torch.randn(4, 32)
    weight[2, 3] = value
    with pytest.raises(FormatError, match="1 NaN or infinite"):
        round_to_nearest(weight, grid)


def test_relative_error() -> None:
    weight = torch.randn(4, 32)
    terms = [round_to_nearest(weight, GRIDS["int4"])]
    expected = float((weight - terms[0].decode()).norm() / weight.norm())
    assert relative_error(weight, terms) == pytest.approx(expected, rel=1e-6)
    assert relative_error(weight, terms * 2) > 0.9
    assert relative_error(torch.zeros(2, 2), [round_to_nearest(torch.zeros(2, 2), GRIDS["int4"])]) == 0.0


SEARCHABLE = [name for name, grid in GRIDS.items() if grid.searchable]


@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("name", SEARCHABLE)
def test_search_is_never_worse_under_its_own_norm(name: str, norm: float) -> None:
    grid, weight = GRIDS[name], torch.distributions.StudentT(3.0).sample((8, 50))
    blocks, importance = grid.prepare(weight, None)
    plain = grid.error(blocks, importance, grid.fit(weight), norm)
    found = grid.error(blocks, importance, fit(grid, weight, None, ClipSearch(norm=norm)), norm)
    if name != "bilevel":  # there, the rows of a tile share steps that suit all of them together
        assert (found <= plain * (1 + 1e-5)).all()
    assert float(found.sum()) <= float(plain.sum())
    assert norm == 2.0 or float(found.sum()) < float(plain.sum())


@pytest.mark.parametrize("zero", ["none", "float"])
@pytest.mark.parametrize("groups", [1, 2])
def test_each_group_has_the_best_codes_of_its_tile(zero: Any, groups: int) -> None:
    """Of all scales and zeros that the second level has; with more than 4 bits the nearest are taken."""
    scales = BilevelScale(scale_bits=3, zero_bits=2, rows=4, groups=groups)
    grid, weight = IntegerGrid(num_bits=3, group_size=16, zero=zero, scales=scales), torch.randn(10, 70)
    params = fit(grid, weight, None, ClipSearch(norm=2))
    blocks, importance = grid.prepare(weight, None)
    found = grid.error(blocks, importance, params)
    codes = [code | other << 4 for code in range(8) for other in range(4 if zero == "float" else 1)]
    tried = [{**params, "scale": torch.full_like(params["scale"], code)} for code in codes]
    assert torch.equal(found, torch.stack([grid.error(blocks, importance, own) for own in tried]).amin(0))
    assert not list(scales.model_copy(update={"zero_bits": 5}).choices(params))


def test_search_minds_importance() -> None:
    """Where only the small weights matter, the range shrinks further."""
    weight = torch.randn(8, 64)
    weight[:, ::16] *= 6
    grid = IntegerGrid(num_bits=3, group_size=16, zero="integer")
    importance = torch.ones_like(weight)
    importance[:, ::16] = 1e-4
    search = ClipSearch(norm=2.0, smallest=0.2, candidates=40)
    with_it = grid.decode(grid.encode(weight, p := fit(grid, weight, importance, search)), p)
    without = grid.decode(grid.encode(weight, p := fit(grid, weight, None, search)), p)
    assert float((importance * (weight - with_it) ** 2).sum()) < float((importance * (weight - without) ** 2).sum())


def test_search_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid = torch.randn(33, 50), IntegerGrid(num_bits=3, group_size=16, zero="integer")
    whole = fit(grid, weight, None, ClipSearch())
    monkeypatch.setattr("rarefy.solvers.clip.CHUNK", 200)
    pieces = fit(grid, weight, None, ClipSearch())
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_tables_are_not_searched() -> None:
    weight = torch.randn(4, 32)
    for grid in (GRIDS["lut"], GRIDS["binary"]):
        found, plain = fit(grid, weight, None, ClipSearch()), grid.fit(weight)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from(sorted(GRIDS)))
def test_decoding_is_exact_for_any_shape(rows: int, columns: int, seed: int, name: str) -> None:
    """What is stored decodes to exactly what the grid chose."""
    grid = GRIDS[name]
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    params = grid.fit(weight)
    term = round_to_nearest(weight, grid)
    assert range_multiplier(weight, grid) is not None or torch.equal(
        term.decode(), grid.decode(grid.encode(weight, params), params)
    )
