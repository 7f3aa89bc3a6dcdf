"""Grids: codes are the nearest, parameters are what the formulas say, and no group of weights is undefined."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from rarefy.core.errors import FormatError
from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LevelGrid, LutGrid
from rarefy.formats.grids.lut import lloyd
from rarefy.formats.scales import BilevelScale, SingleScale
from rarefy.kernels.reference import tables
from tests.formats.samples import FLOAT_FORMATS, GRIDS, SHAPES, weight

SINGLE = {name: grid for name, grid in GRIDS.items() if isinstance(getattr(grid, "scales", None), SingleScale)}
LEARNED = {name: grid for name, grid in GRIDS.items() if grid.family == "lut"} | {
    "ternary": LevelGrid(levels=3, group_size=16)
}


def every(table: dict[str, Grid]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("grid", table.values(), ids=table.keys())


def scale_dtype(grid: Grid) -> torch.dtype:
    name = grid.dtype if isinstance(grid, LutGrid | BinaryGrid) else grid.scales.dtype  # type: ignore[attr-defined]
    return getattr(torch, name)


def round_trip(grid: Grid, values: Tensor, importance: Tensor | None = None) -> Tensor:
    params = grid.fit(values, importance)
    return grid.decode(grid.encode(values, params), params)


def relative_error(grid: Grid, values: Tensor) -> float:
    return float((round_trip(grid, values) - values).norm() / values.norm())


# ---- codes


@every(GRIDS)
def test_codes_are_the_nearest_of_all(grid: Grid) -> None:
    """Against every code there is, in float64; stretched values lie beyond the range that was fitted."""
    for (rows, columns), stretch in itertools.product(SHAPES, (1.0, 1.7)):
        values = weight(rows, columns)
        params = grid.fit(values)
        values = values * stretch
        codes = grid.encode(values, params)
        assert codes.dtype == torch.uint8 and codes.shape == values.shape
        assert int(codes.max()) < grid.code_count
        decoded = grid.decode(codes, params)
        assert decoded.dtype == torch.float32 and decoded.shape == values.shape
        best = torch.full_like(values, torch.inf, dtype=torch.float64)
        for code in range(grid.code_count):
            candidate = grid.decode(torch.full_like(codes, code), params).double()
            best = torch.minimum(best, (candidate - values.double()).abs())
        excess = (decoded.double() - values.double()).abs() - best
        assert float(excess.max()) <= 1e-6 * float(values.abs().max())


@every(GRIDS)
def test_decoding_is_a_fixed_point(grid: Grid) -> None:
    """What a grid can say, it says exactly."""
    values = weight(9, 45)
    params = grid.fit(values)
    decoded = grid.decode(grid.encode(values, params), params)
    torch.testing.assert_close(grid.decode(grid.encode(decoded, params), params), decoded, rtol=1e-6, atol=1e-6)


@every(GRIDS)
def test_a_description_survives_json(grid: Grid) -> None:
    assert type(grid).model_validate_json(grid.model_dump_json()) == grid


@every(GRIDS)
def test_any_floating_weight_is_taken_and_left_alone(grid: Grid) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        values = torch.nn.Parameter(weight(3, 20).to(dtype))
        before = values.detach().clone()
        params = grid.fit(values)
        decoded = grid.decode(grid.encode(values, params), params)
        assert not decoded.requires_grad and not any(tensor.requires_grad for tensor in params.values())
        assert torch.equal(values, before)
        assert torch.equal(decoded, round_trip(grid, before.float()))


@every(GRIDS)
def test_views_mean_the_same_as_copies(grid: Grid) -> None:
    values = weight(45, 9).t()
    assert not values.is_contiguous()
    assert torch.equal(round_trip(grid, values), round_trip(grid, values.contiguous()))


@every(GRIDS)
def test_a_group_is_fitted_on_its_own(grid: Grid) -> None:
    """A short last group gives what it would give as a row of its own: its completion leaves no trace."""
    if grid.group_size != 16 or isinstance(getattr(grid, "scales", None), BilevelScale):
        return
    values = weight(6, 45)
    whole = round_trip(grid, values)
    for first in range(0, 45, 16):
        torch.testing.assert_close(whole[:, first : first + 16], round_trip(grid, values[:, first : first + 16]))


# ---- error bounds


@every({name: grid for name, grid in SINGLE.items() if grid.family == "integer" and name != "level3-none"})
def test_error_of_an_even_grid_is_half_a_step(grid: Grid) -> None:
    """Half a step, and what rounding the scale and the zero to their stored dtype moves the ends of the range."""
    eps = torch.finfo(scale_dtype(grid)).eps
    for rows, columns in SHAPES:
        values = weight(rows, columns)
        params = grid.fit(values)
        step = params["scale"].float()
        zero = params.get("zero_point", torch.full_like(step, grid.code_count / 2)).float()
        slack = eps * (grid.code_count + zero.abs())
        bound = grid.join((step * (0.5 + slack)).unsqueeze(-1).expand(*step.shape, grid.size(columns)), rows, columns)
        decoded = grid.decode(grid.encode(values, params), params)
        assert bool(((decoded - values).abs() <= bound + 1e-6).all())


@every({name: grid for name, grid in SINGLE.items() if grid.family == "float"})
def test_error_of_a_float_grid_is_half_a_gap(grid: FloatGrid) -> None:
    values = weight(17, 77)
    table = tables.table(grid.format).unique()
    gap = float(table.diff().max()) / 2
    params = grid.fit(values)
    scale = params["scale"].float()
    scale = scale.amax(-1) if grid.two_scales else scale
    bound = grid.join(scale.unsqueeze(-1).expand(*scale.shape, grid.size(77)), 17, 77) * gap
    eps = torch.finfo(scale_dtype(grid)).eps
    decoded = grid.decode(grid.encode(values, params), params)
    assert bool(((decoded - values).abs() <= bound * (1 + eps) + 2 * eps * values.abs()).all())


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (IntegerGrid(num_bits=4, zero="float", group_size=32), 0.078),
        (IntegerGrid(num_bits=4, zero="integer", group_size=32), 0.081),
        (IntegerGrid(num_bits=4, zero="integer", group_size=128), 0.1005),
        (IntegerGrid(num_bits=3, zero="integer", group_size=128), 0.215),
    ],
    ids=["int4 g32 float zero", "int4 g32 integer zero", "int4 g128", "int3 g128"],
)
def test_error_on_a_gaussian_matrix(grid: Grid, expected: float, generator: torch.Generator) -> None:
    values = torch.randn(1024, 1024, generator=generator)
    assert relative_error(grid, values) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_zero_point_never_widens_the_range(bits: int) -> None:
    """Float zero spans the values, integer zero the values and 0, no zero the larger side twice."""
    blocks = weight(64, 64).unsqueeze(1)
    steps = [
        IntegerGrid(num_bits=bits, zero=zero).propose(blocks, None)["scale"] for zero in ("float", "integer", "none")
    ]
    assert bool((steps[0] <= steps[1]).all()) and bool((steps[1] <= steps[2] * (1 + 1e-6)).all())
    skewed = torch.rand(64, 64) + 1
    errors = [relative_error(IntegerGrid(num_bits=bits, zero=zero), skewed) for zero in ("float", "integer", "none")]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("name", ["fp3", "fp4", "nf3", "nf4"])
def test_two_scales_follow_a_skewed_group(name: str) -> None:
    values = weight(64, 64)
    values = torch.where(values < 0, values / 4, values)
    one, two = (FloatGrid(format=name, two_scales=two, group_size=32) for two in (False, True))
    assert relative_error(two, values) < relative_error(one, values)


# ---- formulas


def numpy_rtn(values: np.ndarray, bits: int, zero: str) -> np.ndarray:
    """Round to nearest of one group per row, written from the formulas alone."""
    top = 2**bits - 1
    low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
    if zero == "none":
        reach = np.maximum(np.abs(low), np.abs(high))
        step, offset = 2 * reach / top, 2 ** (bits - 1)
    elif zero == "integer":
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        step = (high - low) / top
        offset = np.round(-low / step)
    else:
        step = (high - low) / top
        offset = -low / step
    return (np.clip(np.round(values / step + offset), 0, top) - offset) * step


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
def test_round_to_nearest_is_the_textbook_formula(bits: int, zero: str, generator: torch.Generator) -> None:
    values = torch.randn(32, 48, generator=generator)
    grid = IntegerGrid(num_bits=bits, zero=zero, group_size=48, scales=SingleScale(dtype="float32"))
    expected = numpy_rtn(values.double().numpy(), bits, zero)
    # Without a zero point the largest magnitude lies midway between two codes: either will do.
    tied = values.abs() == values.abs().amax(1, keepdim=True) if zero == "none" else torch.zeros_like(values).bool()
    decoded = torch.where(tied, torch.from_numpy(expected).float(), round_trip(grid, values))
    np.testing.assert_allclose(decoded.numpy(), expected, rtol=1e-4, atol=1e-5)


def normal_quantiles(bits: int) -> np.ndarray:
    """The construction of the normal-float tables: quantiles of both halves, each with its own count, and zero."""
    half = 2 ** (bits - 1)
    offset = 1 - (1 / (2 * (2 * half - 1)) + 1 / (4 * half)) / 2
    positive = norm.ppf(np.linspace(offset, 0.5, half + 1)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, half)[:-1])
    values = np.sort(np.concatenate([negative, [0.0], positive]))
    return values / values.max()


@pytest.mark.parametrize("bits", [3, 4])
def test_normal_float_tables_are_quantiles(bits: int) -> None:
    np.testing.assert_allclose(tables.table(f"nf{bits}").numpy(), normal_quantiles(bits), atol=1e-6)


def test_small_float_tables_are_their_definition() -> None:
    assert tables.table("fp3").tolist() == [0, 1, 2, 4, 0, -1, -2, -4]
    for name, exponent_bits, mantissa_bits in (("fp4", 2, 1), ("fp6_e2m3", 2, 3)):
        bits = 1 + exponent_bits + mantissa_bits
        for code, value in enumerate(tables.table(name).tolist()):
            sign = -1.0 if code >> (bits - 1) else 1.0
            exponent = code >> mantissa_bits & (2**exponent_bits - 1)
            fraction = code % 2**mantissa_bits / 2**mantissa_bits
            expected = fraction if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - 1)
            assert value == sign * expected


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_fp8_tables_are_the_hardware_types(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    table = tables.table(name)
    finite = torch.isfinite(expected)
    assert torch.equal(table[finite], expected[finite])
    largest = torch.finfo(dtype).max
    assert torch.equal(table[~finite].abs(), torch.full_like(table[~finite], largest)), (
        "NaN and infinity read as largest"
    )
    grid = FloatGrid(format=name, scales=SingleScale(dtype="float32"))
    values = torch.randn(1, 4096, generator=generator) * largest / 8
    params = {"scale": torch.ones(1, 1)}
    assert torch.equal(
        grid.decode(grid.encode(values, params), params), values.clamp(-largest, largest).to(dtype).float()
    )


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_codes_that_a_format_calls_undefined_are_never_written(name: str) -> None:
    values = torch.tensor([[1e9, -1e9, 1.0, -0.0]])
    grid = FloatGrid(format=name)
    codes = grid.encode(values, {"scale": torch.ones(1, 1)})
    bits = tables.FORMATS[name]
    if bits == 8:
        dtype = torch.float8_e4m3fn if name == "fp8_e4m3" else torch.float8_e5m2
        assert bool(torch.isfinite(codes.view(dtype).float()).all())
    if not name.startswith("nf"):
        assert int(codes[0, 3]) == 0, "zero is the code of +0"


# ---- bilevel scales


def unbilevel(scales: BilevelScale, params: dict[str, Tensor], has_zero: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and zeros from stored tensors, one by one: step * (code - zero)."""
    first, order = params["scale"].numpy(), params["second_order"].double().numpy()
    rows, groups = first.shape[:2]
    scale, zero = np.zeros((rows, groups)), np.zeros((rows, groups))
    for row, group in itertools.product(range(rows), range(groups)):
        numbers = order[row // scales.rows, group // scales.groups]
        entry = first[row, group]
        codes = (int(entry) & 15, int(entry) >> 4) if first.ndim == 2 else (int(entry[0]), int(entry[1]))
        scale[row, group] = numbers[0] * (codes[0] - numbers[1])
        if has_zero:
            zero[row, group] = numbers[2] * (codes[1] - numbers[3])
    return scale, zero if has_zero else None


@pytest.mark.parametrize("bits", [(3, 3), (4, 2), (5, 4), (8, 8), (1, 1)])
@pytest.mark.parametrize("tile", [(16, 1), (4, 3), (1, 8), (1000, 1000)])
def test_bilevel_scales_are_step_times_code_minus_zero(bits: tuple[int, int], tile: tuple[int, int]) -> None:
    scales = BilevelScale(scale_bits=bits[0], zero_bits=bits[1], rows=tile[0], groups=tile[1])
    grid = IntegerGrid(num_bits=3, zero="float", group_size=16, scales=scales)
    values = weight(21, 77)
    params = grid.fit(values)
    nibbles = max(bits) <= 4
    assert params["scale"].dtype == torch.uint8 and params["scale"].shape == ((21, 5) if nibbles else (21, 5, 2))
    assert params["second_order"].shape == (-(-21 // tile[0]), -(-5 // tile[1]), 4)
    scale, zero = unbilevel(scales, params, True)
    loaded, loaded_zero = scales.load(params)
    assert loaded_zero is not None and zero is not None
    np.testing.assert_allclose(loaded.numpy(), scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loaded_zero.numpy(), zero, rtol=1e-5, atol=1e-5)
    codes = grid.encode(values, params)
    spread = [np.repeat(part, 16, 1)[:, :77] for part in (scale, zero)]
    np.testing.assert_allclose(
        grid.decode(codes, params).numpy(), spread[0] * (codes.numpy() - spread[1]), rtol=1e-4, atol=1e-4
    )


def test_bilevel_error_is_half_a_second_order_step() -> None:
    scales = BilevelScale(scale_bits=4, zero_bits=4, rows=8, groups=2, dtype="float32")
    wanted = torch.rand(33, 7) + 0.01
    stored = scales.store(wanted, None)
    step = stored["second_order"][..., 0].repeat_interleave(8, 0)[:33].repeat_interleave(2, 1)[:, :7]
    assert bool(((scales.load(stored)[0] - wanted).abs() <= step * 0.501).all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_tile_of_nearly_equal_scales_stays_close(dtype: str) -> None:
    """A second-order step of nothing would put the second-order zero beyond any float."""
    scales = BilevelScale(rows=4, groups=2, dtype=dtype)
    finfo = torch.finfo(getattr(torch, dtype))
    signed = [sign * size for size in (1e-6, 1e-3, 1.0, 1e3, 6e4) for sign in (1, -1)]
    for size, spread in itertools.product(signed, (0.0, 1e-7, 1e-4, 1e-2)):
        numbers = size * (1 + spread * torch.linspace(0, 1, 8).reshape(4, 2))
        loaded = scales.load(scales.store(numbers, None))[0]
        torch.testing.assert_close(
            loaded, numbers, rtol=spread / 7 + 2 * finfo.eps, atol=finfo.smallest_normal * finfo.eps
        )


@pytest.mark.parametrize("zero", ["integer", "float"])
@pytest.mark.parametrize("outlier", ["constant", "narrow"])
def test_a_strange_group_does_not_spoil_its_tile(zero: str, outlier: str) -> None:
    """A band far from zero wants a zero point of thousands, which its neighbours could not share."""
    grid = IntegerGrid(num_bits=3, zero=zero, group_size=16, scales=BilevelScale())
    values = weight(16, 64)
    clean = (round_trip(grid, values) - values)[1:].norm()
    values[0, :16] = 0.8 if outlier == "constant" else 0.8 + 1e-4 * torch.rand(16)
    assert float((round_trip(grid, values) - values)[1:].norm()) < 1.1 * float(clean)


# ---- degenerate groups


@every(GRIDS)
def test_a_constant_weight_is_exact_up_to_its_stored_numbers(grid: Grid) -> None:
    constants = (1.0, -1.0, 0.3, -0.3, 1e-7, -1e-7, 6e4, -6e4)
    for (rows, columns), constant in itertools.product(((1, 1), (5, 37)), constants):
        values = torch.full((rows, columns), constant)
        finfo = torch.finfo(scale_dtype(grid))
        smallest = finfo.smallest_normal * finfo.eps  # what a stored number cannot be finer than
        if isinstance(grid, FloatGrid):
            smallest *= float(tables.table(grid.format).max())
        elif not isinstance(getattr(grid, "scales", None), SingleScale):
            smallest *= grid.code_count
        error = (round_trip(grid, values) - values).abs().max()
        assert float(error) <= min(2 * finfo.eps * abs(constant) + smallest, abs(constant) * (1 + 1e-6))


@every(GRIDS)
def test_a_zero_weight_is_zero(grid: Grid) -> None:
    for rows, columns in SHAPES:
        assert not round_trip(grid, torch.zeros(rows, columns)).any()


@every(GRIDS)
def test_a_zero_group_between_others_is_zero(grid: Grid) -> None:
    if isinstance(getattr(grid, "scales", None), BilevelScale) and getattr(grid, "zero", "none") == "float":
        return  # its zero is quantized together with those of the groups around it
    values = weight(4, 48)
    values[:, 16:32] = 0
    decoded = round_trip(grid, values)
    if grid.group_size == 16:
        assert not decoded[:2, 16:32].any() or grid.family == "lut"
    assert bool(torch.isfinite(decoded).all())


@every(GRIDS)
def test_a_single_weight_is_kept(grid: Grid) -> None:
    finfo = torch.finfo(scale_dtype(grid))
    # The scale of a format with large values is itself small.
    coarse = float(tables.table(grid.format).max()) if isinstance(grid, FloatGrid) else 1.0
    for value in (0.37, -0.37):
        error = abs(float(round_trip(grid, torch.tensor([[value]]))) - value)
        assert error <= 2 * finfo.eps * 0.37 + finfo.smallest_normal * finfo.eps * coarse


@every(GRIDS)
def test_groups_far_from_zero_stay_close(grid: Grid) -> None:
    """A narrow band around a large value: the zero point of a float grid lies far outside its codes."""
    values = 100 + torch.rand(8, 48)
    if getattr(grid, "zero", "") == "float" and isinstance(getattr(grid, "scales", None), SingleScale):
        eps = torch.finfo(scale_dtype(grid)).eps
        assert relative_error(grid, values) <= 0.01 / (grid.code_count - 1) + 2 * eps
    assert bool(torch.isfinite(round_trip(grid, values)).all())


@every(GRIDS)
def test_weights_that_are_not_finite_are_refused(grid: Grid) -> None:
    values = weight(3, 20)
    params = grid.fit(values)
    for bad in (math.nan, math.inf, -math.inf):
        values[1, 7] = bad
        with pytest.raises(FormatError, match="1 NaN or infinite"):
            grid.fit(values)
        with pytest.raises(FormatError, match="1 NaN or infinite"):
            grid.encode(values, params)


def test_a_double_that_no_float_holds_is_refused() -> None:
    with pytest.raises(FormatError, match="NaN or infinite"):
        IntegerGrid().fit(torch.full((2, 2), 1e300, dtype=torch.float64))


@every({name: grid for name, grid in GRIDS.items() if scale_dtype(grid) == torch.float16})
def test_a_scale_beyond_float16_names_the_remedy(grid: Grid) -> None:
    values = weight(3, 20) * 1e12
    with pytest.raises(FormatError, match="overflows float16; store scales in bfloat16 or float32"):
        grid.fit(values)
    field = (
        {"dtype": "bfloat16"}
        if grid.family == "lut"
        else {"scales": grid.scales.model_copy(update={"dtype": "bfloat16"})}
    )  # type: ignore[attr-defined]
    assert bool(torch.isfinite(round_trip(grid.model_copy(update=field), values)).all())


@settings(max_examples=100)
@given(
    name=st.sampled_from(sorted(GRIDS)),
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    data=st.data(),
)
def test_any_finite_weight_has_finite_values(name: str, rows: int, columns: int, data: st.DataObject) -> None:
    """Ties, denormals, signed zeros, huge next to tiny: codes in range, values finite."""
    number = st.floats(-30000, 30000, width=32, allow_nan=False, allow_subnormal=True)
    extreme = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-7, 1e-40, 30000.0])
    few = torch.tensor(data.draw(st.lists(st.one_of(number, extreme), min_size=1, max_size=8)))
    values = few[torch.randint(len(few), (rows, columns), generator=torch.Generator().manual_seed(rows))]
    grid = GRIDS[name]
    params = grid.fit(values)
    codes = grid.encode(values, params)
    assert int(codes.max()) < grid.code_count
    assert bool(torch.isfinite(grid.decode(codes, params)).all())


# ---- fitted tables


def cost(values: Tensor, centers: Tensor, mass: Tensor | None = None) -> float:
    distance = (values.unsqueeze(-1) - centers.unsqueeze(-2)).abs().amin(-1).double().square()
    return float((distance if mass is None else distance * mass).sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_k_means_never_gets_worse_by_a_step(weighted: bool, generator: torch.Generator) -> None:
    values = torch.randn(8, 1, 300, generator=generator)
    mass = torch.rand(8, 1, 300, generator=generator) ** 4 if weighted else None
    for count in (2, 4, 8, 16):
        costs = [cost(values, lloyd(values, mass, count, steps), mass) for steps in range(12)]
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(costs))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_fitted_table_beats_even_steps(bits: int, generator: torch.Generator) -> None:
    samples = {
        "normal": torch.randn(32, 512, generator=generator),
        "uniform": torch.rand(32, 512, generator=generator),
        "heavy": torch.randn(32, 512, generator=generator) / torch.rand(32, 512, generator=generator).clamp(min=0.05),
    }
    for name, values in samples.items():
        table = relative_error(LutGrid(num_bits=bits, dtype="float32"), values)
        for zero in ("none", "integer", "float"):
            even = IntegerGrid(num_bits=bits, zero=zero, scales=SingleScale(dtype="float32"))
            assert table < relative_error(even, values), name


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [4, 8, 16])
def test_k_means_is_as_good_as_another_library(weighted: bool, count: int, generator: torch.Generator) -> None:
    from sklearn.cluster import KMeans  # slow to import

    values = torch.randn(6, 1, 400, generator=generator)
    values[..., :4] *= 5
    mass = torch.rand(6, 1, 400, generator=generator) ** 4 if weighted else torch.ones_like(values)
    ours = cost(values, lloyd(values, mass, count), mass)
    theirs = 0.0
    for row, share in zip(values.squeeze(1), mass.squeeze(1), strict=True):
        model = KMeans(count, n_init=3, random_state=0).fit(row.numpy()[:, None], sample_weight=share.numpy())
        theirs += cost(row[None], torch.tensor(model.cluster_centers_.ravel())[None], share[None])
    assert ours <= 1.05 * theirs


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [4, 8, 16])
def test_k_means_is_within_one_percent_of_the_best(weighted: bool, count: int, generator: torch.Generator) -> None:
    """Against all ways to cut the sorted values, by dynamic programming; importances span eight orders of magnitude."""
    values = torch.randn(12, 1, 400, generator=generator)
    values[:6] *= torch.rand(6, 1, 400, generator=generator).reciprocal().sqrt()  # heavy tails
    mass = 10 ** (8 * torch.rand(values.shape, generator=generator) - 8) if weighted else torch.ones_like(values)
    ours = cost(values, lloyd(values, mass, count), mass)
    best = sum(least_cost(row, own, count) for row, own in zip(values.squeeze(1), mass.squeeze(1), strict=True))
    assert best * (1 - 1e-6) <= ours <= 1.01 * best


def least_cost(values: Tensor, mass: Tensor, count: int) -> float:
    order = values.argsort()
    x, m = values[order].double(), mass[order].double()
    total, first, second = (torch.nn.functional.pad((m * x**power).cumsum(0), (1, 0)) for power in range(3))
    weight, moment, square = (sums[None] - sums[:, None] for sums in (total, first, second))  # from row's to column's
    cell = (square - moment**2 / weight.clamp(min=1e-300)).clamp(min=0)
    cell = torch.where(torch.ones_like(cell, dtype=torch.bool).triu(), cell, torch.inf)
    lowest = cell[0]
    for _ in range(count - 1):
        lowest = (lowest[:, None] + cell).amin(0)
    return float(lowest[-1])


def test_few_distinct_values_are_all_found() -> None:
    values = torch.tensor([[-2.0, 0.0, 0.0, 5.0, 5.0, 5.0, 7.0]])
    for bits in (2, 3, 8):
        assert torch.equal(round_trip(LutGrid(num_bits=bits), values), values)
    assert torch.equal(round_trip(BinaryGrid(regions=2, group_size=None), values), values)


@pytest.mark.parametrize("regions", [1, 2, 3, 4])
def test_binary_regions_never_lose_to_one_shot_binarization(regions: int, generator: torch.Generator) -> None:
    """Sign times mean magnitude around the mean of a row block, the operator that the grid refines."""
    values = torch.randn(16, 128, generator=generator)
    mean = values.mean(1, keepdim=True)
    deviation = values - mean
    once = mean + torch.where(deviation >= 0, 1.0, -1.0) * deviation.abs().mean(1, keepdim=True)
    decoded = round_trip(BinaryGrid(regions=regions, dtype="float32"), values)
    assert float((decoded - values).norm()) <= float((once - values).norm()) * (1 + 1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_ternary_scale_is_the_best_of_all(weighted: bool, generator: torch.Generator) -> None:
    """Against every support of nine weights, each with its least-squares scale."""
    values = torch.randn(20, 9, generator=generator)
    mass = torch.rand(20, 9, generator=generator) + 0.01 if weighted else torch.ones(20, 9)
    grid = LevelGrid(levels=3, scales=SingleScale(dtype="float32"))
    error = (round_trip(grid, values, mass) - values).square() * mass
    best = torch.full((20,), math.inf)
    for chosen in itertools.product([0.0, 1.0], repeat=9):
        support = torch.tensor(chosen) * mass
        scale = (support * values.abs()).sum(1) / support.sum(1).clamp(min=1e-9)
        decoded = values.sign() * scale[:, None] * torch.tensor(chosen)
        best = torch.minimum(best, ((decoded - values).square() * mass).sum(1))
    torch.testing.assert_close(error.sum(1), best, rtol=1e-5, atol=1e-6)


# ---- importance


@every(LEARNED)
def test_columns_without_importance_have_no_say(grid: Grid) -> None:
    values, importance = weight(8, 45), torch.rand(8, 45) + 0.1
    importance[:, [3, 20, 44]] = 0
    expected = grid.fit(values, importance)
    for replacement in (0.0, 100.0, -3.0):
        changed = values.clone()
        changed[:, [3, 20, 44]] = replacement
        for name, tensor in grid.fit(changed, importance).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3)


@every(LEARNED)
def test_importance_is_a_matter_of_ratio(grid: Grid) -> None:
    values, importance = weight(8, 45), torch.rand(8, 45) + 0.1
    expected = grid.fit(values, importance)
    for factor in (2.0**-40, 2.0**40):
        for name, tensor in grid.fit(values, importance * factor).items():
            assert torch.equal(tensor, expected[name])


@every(GRIDS)
def test_importance_of_nothing_or_all_alike_counts_equally(grid: Grid) -> None:
    values = weight(8, 45)
    expected = grid.fit(values)
    for importance in (torch.zeros(8, 45), torch.ones(8, 45), torch.full((8, 45), 0.25)):
        for name, tensor in grid.fit(values, importance).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


@every(LEARNED)
def test_importance_lowers_the_error_it_counts(grid: Grid, generator: torch.Generator) -> None:
    values = torch.randn(32, 64, generator=generator)
    importance = torch.rand(32, 64, generator=generator) ** 6 + 1e-4
    plain, heeded = (
        ((round_trip(grid, values, mass) - values).square() * importance).sum() for mass in (None, importance)
    )
    assert float(heeded) <= float(plain) * 1.001


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_importance_that_is_no_importance_is_refused(bad: float) -> None:
    importance = torch.ones(3, 20)
    importance[1, 1] = bad
    with pytest.raises(FormatError, match="importance"):
        LutGrid().fit(weight(3, 20), importance)


@every(GRIDS)
def test_error_is_the_weighted_power_of_differences(grid: Grid) -> None:
    values, importance = weight(6, 48), torch.rand(6, 48)
    params = grid.fit(values)
    blocks, mass = grid.prepare(values, importance)
    expected = ((grid.decode(grid.encode(values, params), params) - values).abs() ** 2.4 * importance).sum()
    torch.testing.assert_close(grid.error(blocks, mass, params, 2.4).sum(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (IntegerGrid, {"num_bits": 0}),
        (IntegerGrid, {"num_bits": 9}),
        (IntegerGrid, {"num_bits": 1}),
        (IntegerGrid, {"group_size": 0}),
        (IntegerGrid, {"group_size": 2**40}),
        (LevelGrid, {"levels": 4}),
        (FloatGrid, {"format": "fp5"}),
        (FloatGrid, {"two_scales": True, "scales": BilevelScale()}),
        (BinaryGrid, {"regions": 5}),
        (LutGrid, {"rows_per_lut": 0}),
        (BilevelScale, {"scale_bits": 9}),
        (IntegerGrid, {"bits": 4}),
    ],
)
def test_impossible_grids_are_refused(grid: type, options: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        grid(**options)
