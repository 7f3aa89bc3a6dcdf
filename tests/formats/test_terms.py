"""Terms: what is stored is what was solved, for every grid at every pattern, moved, stacked, saved and composed."""

from __future__ import annotations

import copy
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rarefy import packing
from rarefy.core.errors import FormatError
from rarefy.formats.bytes import ByteCount, total
from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LevelGrid, LutGrid
from rarefy.formats.inputs import hadamard
from rarefy.formats.layout import DTYPES, bind
from rarefy.formats.patterns import NM, Bitmap, Full, Groups, Pattern
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms import (
    Dense,
    Partition,
    Product,
    Quantized,
    Residual,
    Shared,
    Sparse,
    Term,
    TermSpec,
    parse_spec,
    stack,
)
from rarefy.formats.terms.composed import PartitionSpec, PartSpec
from rarefy.formats.terms.plain import DenseSpec
from rarefy.formats.terms.quantized import QuantizedSpec
from tests.formats.samples import (
    GRIDS,
    PATTERNS,
    SHAPES,
    TERMS,
    fits,
    fitted,
    inputs,
    mask_for,
    quantized,
    residual,
    weight,
)

PAIRS = [
    (grid, pattern) for grid, pattern in itertools.product(GRIDS, PATTERNS) if fits(GRIDS[grid], PATTERNS[pattern])
]
STACKED = [name for name in TERMS if name != "shared"]


def every(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


def tensors_of(term: nn.Module) -> dict[str, Tensor]:
    return dict(term.named_buffers())


def described(term: nn.Module) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors_of(term).items()}


def check_meaning(term: Term, expected: Tensor) -> None:
    """The term decodes to exactly ``expected``, multiplies like it, and comes back from its own description."""
    term.check()
    decoded = term.decode()
    assert decoded.dtype == torch.float32 and torch.equal(decoded, expected)
    x = torch.randn(3, term.columns, dtype=torch.float64)
    torch.testing.assert_close(term(x), x @ decoded.double().T, rtol=1e-5, atol=1e-5 * float(decoded.abs().max() + 1))
    again = rebuilt(term)
    assert torch.equal(again.decode(), decoded)
    assert term.byte_count().total == sum(
        tensor.numel() * tensor.element_size() for tensor in tensors_of(term).values()
    )


def rebuilt(term: Term) -> Term:
    """What a loader makes: description through JSON, sizes from dtypes and shapes, empty tensors filled by name."""
    spec = parse_spec(json.loads(json.dumps(term.spec.model_dump(mode="json"))))
    assert spec == term.spec and type(spec) is type(term.spec)
    layout = spec.layout(term.shape)
    found = described(term)
    assert set(layout) == set(found)
    assert all(entry.dtype in DTYPES.values() for entry in layout.values())
    again = spec.empty(term.shape, bind(layout, found, "layer.terms.0"))
    assert described(again) == found
    again.load_state_dict(term.state_dict())
    again.check()
    return again


# ---- quantized: every grid at every pattern


@pytest.mark.parametrize(("grid", "pattern"), PAIRS, ids=lambda name: name)
def test_stored_codes_mean_what_the_grid_said(grid: str, pattern: str) -> None:
    for seed, (rows, columns) in enumerate(SHAPES):
        codes, params = fitted(GRIDS[grid], rows, columns, seed)
        mask = mask_for(PATTERNS[pattern], rows, columns, seed)
        term = Quantized.from_codes(codes, params, GRIDS[grid], pattern=PATTERNS[pattern], mask=mask)
        check_meaning(term, torch.where(mask, GRIDS[grid].decode(codes, params), 0.0))


@every([name for name, grid in GRIDS.items() if not isinstance(grid, LevelGrid)])
def test_bit_planes_mean_the_same_as_bit_streams(name: str) -> None:
    stream = quantized(GRIDS[name], Full(), 9, 77)
    planes = quantized(GRIDS[name], Full(), 9, 77, planes=True)
    assert planes.get_buffer("codes").shape == (GRIDS[name].code_bits, 9, 3)
    check_meaning(planes, stream.decode())


@pytest.mark.parametrize(
    "grid", [LutGrid(num_bits=3), LutGrid(num_bits=3, rows_per_lut=None), BinaryGrid(group_size=None)]
)
@pytest.mark.parametrize("index", ["ids", "csr", "bitmap"])
def test_tables_without_column_groups_take_group_patterns(grid: Grid, index: str) -> None:
    for size in (1, 5, 16, 100):
        pattern = Groups(size=size, index=index)  # type: ignore[arg-type]
        term = quantized(grid, pattern, 7, 45)
        check_meaning(term, torch.where(mask_for(pattern, 7, 45), quantized(grid, Full(), 7, 45).decode(), 0.0))


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
@pytest.mark.parametrize("index", ["ids", "csr", "bitmap"])
def test_groups_of_any_size(size: int, index: str) -> None:
    pattern = Groups(size=size, index=index)  # type: ignore[arg-type]
    for grid in (
        IntegerGrid(group_size=size, zero="integer"),
        LevelGrid(group_size=size, levels=5, zero="float"),
        FloatGrid(group_size=size, two_scales=True),
        IntegerGrid(group_size=size, zero="integer", scales=BilevelScale(scale_bits=8, rows=4, groups=3)),
    ):
        full = quantized(grid, Full(), 5, 77)
        check_meaning(quantized(grid, pattern, 5, 77), torch.where(mask_for(pattern, 5, 77), full.decode(), 0.0))


@pytest.mark.parametrize("keep", [False, True], ids=["nothing kept", "all kept"])
@every([name for name, pattern in PATTERNS.items() if isinstance(pattern, Bitmap | Groups)])
def test_nothing_and_everything_can_be_kept(name: str, keep: bool) -> None:
    grid = IntegerGrid(group_size=16, zero="integer")
    dense = weight(3, 40)
    params = grid.fit(dense)
    codes, mask = grid.encode(dense, params), torch.full((3, 40), keep)
    term = Quantized.from_codes(codes, params, grid, pattern=PATTERNS[name], mask=mask)
    check_meaning(term, grid.decode(codes, params) * keep)
    check_meaning(Sparse.from_weight(dense, mask, PATTERNS[name]), dense * keep)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (3, 3), (1, 62), (61, 62), (5, 10), (1, 1)])
@pytest.mark.parametrize("index", ["bitmap", "rank"])
def test_n_of_m_at_any_width(n: int, m: int, index: str) -> None:
    pattern = NM(n=n, m=m, index=index if (n, m) != (5, 10) or index == "bitmap" else "bitmap")  # type: ignore[arg-type]
    for rows, columns in (*SHAPES, (3, m), (2, 2 * m + 1)):
        mask = mask_for(pattern, rows, columns)
        dense = weight(rows, columns)
        term = Sparse.from_weight(dense, mask, pattern)
        kept = columns // m * n + -(-n * (columns % m) // m)
        assert term.get_buffer("values").shape == (rows, kept)
        check_meaning(term, torch.where(mask, dense, 0.0))


def test_ranks_cost_what_the_number_of_subsets_asks() -> None:
    for n, m, bits in ((2, 4, 3), (4, 8, 7), (1, 4, 2), (2, 8, 5), (4, 4, 1)):
        layout = NM(n=n, m=m, index="rank").layout(1, 32 * m)
        assert layout["indices"].shape == (1, 1, bits)


def test_a_multiplier_reaches_beyond_16_bits() -> None:
    grid = IntegerGrid(group_size=16)
    for factor in (2.0**-40, 2.0**40):
        term = quantized(grid, Full(), 4, 40, multiplier=factor)
        expected = quantized(grid, Full(), 4, 40).decode() * factor
        check_meaning(term, expected)
        x = (torch.randn(3, 40) * 0.01).half()
        if factor < 1:
            assert torch.equal(
                quantized(grid, Full(), 4, 40, multiplier=2.0**-3)(x), (x @ (expected / factor / 8).half().T)
            )


def test_codes_of_another_grid_are_refused() -> None:
    grid = LevelGrid(levels=3, group_size=16)
    params = grid.fit(weight(2, 20))
    with pytest.raises(FormatError, match="0 to 2"):
        Quantized.from_codes(torch.full((2, 20), 3, dtype=torch.uint8), params, grid)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (Full(), "full pattern"),
        (NM(), "2 of every 4"),
        (NM(index="rank"), "2 of every 4"),
        (Groups(size=4), "different numbers"),
        (Groups(size=16), "parts of groups"),
        (Groups(size=16, index="csr"), "parts of groups"),
        (Groups(size=16, index="bitmap"), "parts of groups"),
    ],
    ids=str,
)
def test_masks_that_break_their_pattern_are_refused(pattern: Pattern, message: str) -> None:
    mask = torch.zeros(5, 20, dtype=torch.bool)
    mask[2, :4] = True
    dense = weight(5, 20)
    grid = IntegerGrid(group_size=pattern.group)
    params = grid.fit(dense)
    with pytest.raises(FormatError, match=message):
        Sparse.from_weight(dense, mask, pattern)
    with pytest.raises(FormatError, match=message):
        Quantized.from_codes(grid.encode(dense, params), params, grid, pattern=pattern, mask=mask)


def test_more_groups_than_two_bytes_can_name_need_a_bitmap() -> None:
    mask = torch.zeros(1, 65537, dtype=torch.bool)
    mask[0, -1] = True
    for index in ("ids", "csr"):
        with pytest.raises(FormatError, match="65536"):
            Groups(size=1, index=index).store(mask)  # type: ignore[arg-type]
    dense = torch.ones(1, 65537)
    check_meaning(Sparse.from_weight(dense, mask, Groups(size=1, index="bitmap")), mask.float())


# ---- plain terms


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_and_sparse_keep_values_to_their_dtype(dtype: str, shape: tuple[int, int]) -> None:
    values = torch.randn(shape)
    stored = values.to(getattr(torch, dtype)).float()
    check_meaning(Dense.from_weight(values, dtype), stored)  # type: ignore[arg-type]
    for pattern in PATTERNS.values():
        mask = mask_for(pattern, *shape)
        check_meaning(Sparse.from_weight(values, mask, pattern, dtype), torch.where(mask, stored, 0.0))  # type: ignore[arg-type]


def test_values_beyond_a_dtype_name_the_remedy() -> None:
    values = torch.full((2, 3), 1e5)
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    for make in (
        lambda: Dense.from_weight(values),
        lambda: Sparse.from_weight(values, everywhere),
        lambda: Residual.from_weight(values, everywhere),
    ):
        with pytest.raises(FormatError, match="does not fit float16; store this term in bfloat16 or float32"):
            make()
    torch.testing.assert_close(Residual.from_weight(values, everywhere, "bfloat16").decode(), values, rtol=1e-2, atol=0)


def test_a_stored_parameter_asks_for_no_gradient() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    for term in (Dense.from_weight(weight, "float32"), Sparse.from_weight(weight, weight > 0, dtype="float32")):
        assert not any(tensor.requires_grad for tensor in term.buffers())
        copy.deepcopy(term)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 65536), (3, 65537), (2, 140000)], ids=str)
def test_residuals_at_any_width(dtype: str, shape: tuple[int, int]) -> None:
    """Beyond 65536 columns a row continues in the next panel."""
    rows, columns = shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype)).float()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < (0.3 if columns < 1000 else 0.001)
    mask[-1, -1] = mask[0, 0] = True
    if columns > 65536:
        mask[0, 65535] = mask[0, 65536] = True
    term = Residual.from_weight(values, mask, dtype)  # type: ignore[arg-type]
    assert term.get_buffer("row_ptr").shape == (-(-columns // 65536), rows + 1)
    check_meaning(term, torch.where(mask, values, 0.0))
    count = term.byte_count()
    assert count.values == 2 * int(mask.sum()) and count.indices == 2 * int(mask.sum()) + 4 * (rows + 1) * -(
        -columns // 65536
    )


def test_a_quantized_weight_and_its_residual_are_exact_where_the_residual_is() -> None:
    dense = weight(9, 45)
    base = quantized(IntegerGrid(group_size=16), Full(), 9, 45)
    outliers = dense.abs() > 1.5
    both = base.decode() + Residual.from_weight(dense - base.decode(), outliers).decode()
    torch.testing.assert_close(both[outliers], dense[outliers], rtol=1e-3, atol=1e-3)
    assert torch.equal(both[~outliers], base.decode()[~outliers])


# ---- every term: forward, moves, files


@every(list(TERMS))
def test_forward_is_the_product_with_the_dense_weight(name: str) -> None:
    term = TERMS[name]()
    dense = term.decode().double()
    for shape in ((40,), (1, 40), (0, 40), (2, 3, 40)):
        x = torch.randn(shape, dtype=torch.float64)
        y = term(x)
        assert y.dtype == x.dtype and y.shape == (*shape[:-1], 6)
        torch.testing.assert_close(y, x @ dense.T, rtol=1e-5, atol=1e-5)


@every(list(TERMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_result_has_the_dtype_of_the_input(name: str, dtype: torch.dtype) -> None:
    term = TERMS[name]()
    x = torch.randn(5, 40).to(dtype)
    y = term(x)
    assert y.dtype == dtype
    expected = x.double() @ term.decode().double().T
    bound = 40 * torch.finfo(dtype).eps * float(expected.abs().max() + 1)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=bound)


@every(STACKED)
def test_a_term_comes_back_from_its_description(name: str) -> None:
    term = TERMS[name]()
    check_meaning(term, term.decode())
    assert str(term)


@every(STACKED)
def test_bytes_counted_are_bytes_in_the_file(name: str, tmp_path: Path) -> None:
    term = TERMS[name]()
    path = tmp_path / "term.safetensors"
    save_file(term.state_dict(), path)
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert term.byte_count().total == path.stat().st_size - 8 - header
    again = term.spec.empty(term.shape, bind(term.spec.layout(term.shape), described(term), "term"))
    again.load_state_dict(load_file(path))
    assert torch.equal(again.decode(), term.decode())


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to": lambda module: module.to(torch.bfloat16),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "type": lambda module: module.type(torch.float64),
    "deepcopy": copy.deepcopy,
}


@every(list(TERMS))
def test_no_cast_touches_what_is_stored(name: str) -> None:
    term = TERMS[name]()
    before = {key: tensor.clone() for key, tensor in tensors_of(term).items()}
    for cast in CASTS.values():
        after = tensors_of(cast(nn.ModuleDict({"layer": nn.Sequential(term)})))
        for key, tensor in before.items():
            moved = after[f"layer.0.{key}"]
            assert moved.dtype == tensor.dtype and torch.equal(moved, tensor)


@every(STACKED)
def test_a_term_without_storage_keeps_its_dtypes_and_shapes(name: str) -> None:
    term = TERMS[name]()
    found = described(term)
    meta = copy.deepcopy(term).to("meta")
    assert described(meta) == found and all(tensor.is_meta for tensor in meta.buffers())
    assert described(copy.deepcopy(term).to("meta", torch.float16)) == found
    with torch.device("meta"):
        empty = term.spec.empty(term.shape, bind(term.spec.layout(term.shape), found, "term"))
    assert described(empty) == found and all(tensor.is_meta for tensor in empty.buffers())
    filled = meta.to_empty(device="cpu")
    filled.load_state_dict(term.state_dict())
    assert torch.equal(filled.decode(), term.decode())
    empty.load_state_dict(term.state_dict(), assign=True)
    assert torch.equal(empty.decode(), term.decode())


def test_tables_made_while_a_model_has_no_storage_are_real() -> None:
    """A table is kept for the life of the process; the first call may come at any time."""
    from rarefy.kernels.reference import patterns, tables

    for cached in (tables.table, patterns.subsets):
        cached.cache_clear()
    terms = [quantized(GRIDS[name], NM(index="rank"), 3, 40) for name in ("fp4", "nf4", "fp8_e4m3", "fp6_e2m3")]
    expected = [term.decode() for term in terms]
    for cached in (tables.table, patterns.subsets):
        cached.cache_clear()
    with torch.device("meta"):
        made = [term.decode() for term in terms]
    for term, during, before in zip(terms, made, expected, strict=True):
        assert torch.equal(term.decode(), before)
        assert during.is_meta or torch.equal(during, before)


# ---- inputs


@every([name for name in inputs(40) if name != "raw"])
@pytest.mark.parametrize("columns", [1, 2, 5, 40, 96, 144])
def test_a_transformed_input_is_folded_into_the_dense_weight(name: str, columns: int) -> None:
    spec, tensors = inputs(columns)[name]
    grid = IntegerGrid(group_size=16, zero="float")
    term = quantized(grid, Full(), 3, columns, input=spec, input_tensors=tensors)
    x = torch.randn(7, columns, dtype=torch.float64)
    plain = quantized(grid, Full(), 3, columns).decode().double()
    dense = term.decode().double()
    torch.testing.assert_close(term(x), x @ dense.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spec.transform(x, tensors) @ plain.T, x @ dense.T, rtol=1e-5, atol=1e-5)
    check_meaning(term, term.decode())
    assert term.byte_count().transform == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("columns", [1, 2, 3, 8, 12, 96, 576])
def test_hadamard_is_orthonormal_and_its_own_inverse(columns: int) -> None:
    matrix = hadamard(torch.eye(columns, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(columns, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T)
    x = torch.randn(2, 3, columns, dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close(hadamard(x).norm(dim=-1), x.norm(dim=-1))
    size = columns & -columns
    assert int((matrix[0] != 0).sum()) == size, "blocks are the largest power of two that divides the width"


def test_16_bit_inputs_stay_in_range_when_they_are_transformed() -> None:
    """Sums of a rotation, and factors of a scaling, may exceed float16 where the result does not."""
    x = torch.full((1, 4096), 100.0, dtype=torch.float16)
    assert hadamard(x).dtype == torch.float16 and float(hadamard(x)[0, 0]) == 6400.0
    spec, _ = inputs(4)["scaled"]
    small = torch.full((1, 4), 1e-3, dtype=torch.float16)
    scaled = spec.transform(small, {"input_scale": torch.full((4,), 1e6)})
    assert scaled.dtype == torch.float16 and bool(torch.isfinite(scaled).all())


# ---- composed terms


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_a_product_multiplies_its_factors(rank: int) -> None:
    left, right = weight(6, rank, 1), weight(rank, 45, 2)
    lowrank = Product(Dense.from_weight(left), Dense.from_weight(right))
    torch.testing.assert_close(lowrank.decode(), left @ right)
    check_meaning(lowrank, lowrank.decode())
    mask = mask_for(Bitmap(), rank, 45)
    dictionary = Product(quantized(IntegerGrid(group_size=2), Full(), 6, rank), Sparse.from_weight(right, mask))
    check_meaning(dictionary, dictionary.lowrank_b.decode() @ (right * mask))
    turned = Product(Sparse.from_weight(left, left > 0), Dense.from_weight(right))
    check_meaning(turned, (left * (left > 0)) @ right)
    nested = Product(lowrank, Dense.from_weight(weight(45, 7)))
    torch.testing.assert_close(nested.decode(), left @ right @ weight(45, 7), rtol=1e-4, atol=1e-3)
    check_meaning(nested, nested.decode())


def test_factors_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(FormatError, match=r"\[6, 4\] and \[5, 7\] do not multiply"):
        Product(Dense.from_weight(weight(6, 4)), Dense.from_weight(weight(5, 7)))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_partition_puts_its_parts_where_they_belong(axis: str, ordered: bool) -> None:
    position, sizes = {"rows": 0, "columns": 1}[axis], (5, 1, 12)
    shapes = [(size, 45) if axis == "rows" else (7, size) for size in sizes]
    parts: list[Term] = [
        quantized(IntegerGrid(group_size=16, zero="integer"), Bitmap(), *shapes[0]),
        Dense.from_weight(weight(*shapes[1])),
        residual(*shapes[2]),
    ]
    order = torch.randperm(18) if ordered else torch.arange(18)
    term = Partition.of(axis, parts, order if ordered else None)  # type: ignore[arg-type]
    expected = torch.empty(18, 45) if axis == "rows" else torch.empty(7, 18)
    expected.index_copy_(position, order, torch.cat([part.decode() for part in parts], position))
    check_meaning(term, expected)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_partition_by_experts_gives_each_its_own_term(ordered: bool) -> None:
    int4 = IntegerGrid(group_size=16)
    groups = [[quantized(int4, Full(), 6, 40, seed) for seed in range(2)], [residual(6, 40, seed) for seed in range(3)]]
    order = torch.tensor([4, 0, 2, 1, 3]) if ordered else torch.arange(5)
    term = Partition.of("experts", [stack(list(group)) for group in groups], order if ordered else None)
    members = [member for group in groups for member in group]
    expected = torch.empty(5, 6, 40)
    for position, member in zip(order.tolist(), members, strict=True):
        expected[position] = member.decode()
    assert torch.equal(term.decode(), expected)
    assert torch.equal(rebuilt(term).decode(), expected)
    for index in range(5):
        assert torch.equal(term.select(index).decode(), expected[index])
    assert term.byte_count().total == total([member.byte_count() for member in members]).total + (
        20 if ordered else 0
    ) + (
        term.parts[1].byte_count().total - total([member.byte_count() for member in groups[1]]).total  # type: ignore[operator]
    )


def test_partitions_that_do_not_fit_are_refused() -> None:
    part = PartSpec(size=3, term=DenseSpec())
    spec = PartitionSpec(axis="rows", parts=(part, part))
    with pytest.raises(FormatError, match="the parts cover 6 rows of 7"):
        spec.layout((7, 4))
    experts = PartitionSpec(axis="experts", parts=(part, part))
    for shape in ((6, 4), (2, 6, 4, 4)):
        with pytest.raises(FormatError, match="cannot be partitioned by experts"):
            experts.layout(shape)
    with pytest.raises(FormatError, match="no input of its own"):
        parse_spec({**experts.model_dump(mode="json"), "input": {"type": "permuted"}})


def test_a_shared_term_is_stored_once() -> None:
    class Layer(nn.Module):
        def __init__(self, term: Term):
            super().__init__()
            self.terms = nn.ModuleList([term])

    dictionary, codes = Dense.from_weight(weight(6, 5)), Sparse.from_weight(weight(5, 40), weight(5, 40) > 0)
    model = nn.ModuleDict({"first": Layer(Product(dictionary, codes))})
    ref = "first.terms.0.lowrank_b"
    model["second"] = Layer(Product(Shared.of(dictionary, ref), Dense.from_weight(weight(5, 40, 3))))
    users = [name for name, module in model.named_modules() if isinstance(module, Shared)]
    assert users == ["second.terms.0.lowrank_b"]
    expected = weight(6, 5) @ weight(5, 40, 3)
    term = model["second"].terms[0]
    torch.testing.assert_close(term.decode(), expected)
    assert term.byte_count() == ByteCount(values=5 * 40 * 2)
    assert not [name for name in model.state_dict() if name.startswith("second.terms.0.lowrank_b")]

    fresh = parse_spec(json.loads(term.spec.model_dump_json())).empty(term.shape, {})
    fresh.load_state_dict(term.state_dict())
    fresh.check()
    with pytest.raises(FormatError, match="not connected"):
        fresh.decode()
    for module in fresh.modules():
        if isinstance(module, Shared):
            module.resolve(model)
    torch.testing.assert_close(fresh.decode(), expected)

    twin = copy.deepcopy(model)
    twin["first"].terms[0].lowrank_b.values.zero_()
    assert not twin["second"].terms[0].decode().any(), "a copied model shares within itself"
    torch.testing.assert_close(term.decode(), expected)
    x = torch.randn(3, 40).bfloat16()
    assert torch.equal(model.to(torch.bfloat16)["second"].terms[0](x), term(x))


def test_a_shared_term_that_cannot_be_followed_is_refused() -> None:
    owner = Dense.from_weight(weight(6, 40))
    model = nn.ModuleDict({"owner": owner, "plain": nn.Linear(40, 6), "small": Dense.from_weight(weight(6, 8))})
    model["chain"] = Shared.of(owner, "owner")
    model["inside"] = Product(Dense.from_weight(weight(6, 6)), Shared.of(owner, "owner"))
    spec = Shared.of(owner, "owner").spec
    for ref, message in (
        ("nobody", "does not exist"),
        ("owner.values", "does not exist"),
        ("..", "does not exist"),
        ("plain", "not a stored term of shape"),
        ("small", r"not a stored term of shape \[6, 40\]"),
        ("chain", "not a stored term"),
        ("inside", "refers to other terms"),
    ):
        shared = Shared(spec.model_copy(update={"ref": ref}), (6, 40))
        with pytest.raises(FormatError, match=message):
            shared.resolve(model)


# ---- stacks


@every(STACKED)
def test_experts_stack_and_come_apart(name: str) -> None:
    """Members with other data, so that sizes that depend on it differ where the term allows that."""
    make = TERMS[name]
    members = [make(), make()]
    with torch.no_grad():
        for tensor in members[1].buffers():
            if tensor.is_floating_point():
                tensor.neg_()
    whole = stack(members)
    assert whole.shape == (2, 6, 40)
    expected = torch.stack([member.decode() for member in members])
    assert torch.equal(whole.decode(), expected)
    whole.check()
    again = rebuilt(whole)
    assert torch.equal(again.decode(), expected)
    for index, member in enumerate(members):
        single = whole.select(index)
        assert single.shape == (6, 40)
        x = torch.randn(3, 40)
        assert torch.equal(single(x), member(x))
    assert whole.byte_count() == total([member.byte_count() for member in members])


@every([name for name, pattern in PATTERNS.items() if pattern.kept_shape(1, 1) == ("kept",)])
def test_experts_may_keep_different_numbers_of_weights(name: str) -> None:
    grid, pattern = GRIDS["int4-bilevel8-integer"], PATTERNS[name]
    masks = [torch.zeros(3, 40, dtype=torch.bool), mask_for(pattern, 3, 40, 1), torch.ones(3, 40, dtype=torch.bool)]
    dense = weight(3, 40)
    params = grid.fit(dense)
    codes = grid.encode(dense, params)
    for members in (
        [Quantized.from_codes(codes, params, grid, pattern=pattern, mask=mask) for mask in masks],
        [Sparse.from_weight(dense, mask, pattern) for mask in masks],
        [Residual.from_weight(dense, mask) for mask in masks],
    ):
        whole = stack(list(members))
        whole.check()
        assert torch.equal(rebuilt(whole).decode(), torch.stack([member.decode() for member in members]))


def test_a_row_that_lists_its_groups_cannot_be_filled() -> None:
    dense, pattern = weight(3, 40), Groups(size=16)
    masks = [torch.zeros(3, 40, dtype=torch.bool), torch.ones(3, 40, dtype=torch.bool)]
    with pytest.raises(FormatError, match="differs in size between experts; use a bitmap or csr index"):
        stack([Sparse.from_weight(dense, mask, pattern) for mask in masks])


def test_experts_of_different_descriptions_become_a_partition() -> None:
    members: list[Term] = [
        quantized(IntegerGrid(num_bits=bits, group_size=16), Full(), 6, 40, seed)
        for seed, bits in enumerate((4, 2, 4, 3, 2))
    ]
    whole = stack(members)
    assert (
        isinstance(whole, Partition)
        and whole.axis == "experts"
        and [part.shape[0] for part in whole._terms()] == [2, 2, 1]
    )
    assert torch.equal(whole.decode(), torch.stack([member.decode() for member in members]))
    assert torch.equal(rebuilt(whole).decode(), whole.decode())


def test_what_cannot_be_stacked_is_refused() -> None:
    with pytest.raises(FormatError, match="one shape"):
        stack([residual(3, 4), residual(4, 3)])
    with pytest.raises(FormatError, match="Shared terms"):
        stack([TERMS["shared"](), TERMS["shared"]()])


def test_a_stack_of_stacks_decodes() -> None:
    inner = [
        stack([quantized(GRIDS["int4-float"], Full(), 3, 20, 2 * group + seed) for seed in range(2)])
        for group in range(2)
    ]
    tensors = {name: torch.stack([tensors_of(term)[name] for term in inner]) for name in tensors_of(inner[0])}
    whole = inner[0].spec.build((2, 2, 3, 20), tensors)
    whole.check()
    assert torch.equal(whole.decode(), torch.stack([term.decode() for term in inner]))
    assert torch.equal(rebuilt(whole).decode(), whole.decode())


# ---- counts and layouts


def test_bytes_by_purpose() -> None:
    """A weight of 64 x 256 at int4 with groups of 128, an integer zero, and half a percent of outliers."""
    grid = IntegerGrid(zero="integer", group_size=128)
    term = quantized(grid, Full(), 64, 256)
    assert term.byte_count() == ByteCount(codes=64 * 256 // 2, scales=64 * 2 * 2 + 64 * 2 // 2)
    assert term.byte_count().bits_per_weight(64 * 256)["total"] == pytest.approx(4 + 20 / 128)
    assert quantized(LutGrid(num_bits=3), Full(), 64, 256).byte_count() == ByteCount(codes=64 * 96, tables=64 * 16)
    five = quantized(LevelGrid(levels=3, group_size=128), Full(), 64, 255).byte_count()
    assert five == ByteCount(codes=64 * 51, scales=64 * 2 * 2)
    kept = Sparse.from_weight(weight(64, 256), mask_for(NM(index="rank"), 64, 256), NM(index="rank")).byte_count()
    assert kept == ByteCount(values=64 * 128 * 2, indices=64 * 24)
    double = term.byte_count() + kept
    assert double.total == term.byte_count().total + kept.total and double.values == kept.values
    assert ByteCount().bits_per_weight(0)["total"] == 0


@pytest.mark.parametrize(
    ("scales", "expected"),
    [(BilevelScale(), 3 + 8 / 16 + 64 / 256), (BilevelScale(scale_bits=8, zero_bits=8), 3 + 16 / 16 + 64 / 256)],
    ids=["nibbles", "bytes"],
)
def test_bilevel_bits_per_weight(scales: BilevelScale, expected: float) -> None:
    grid = IntegerGrid(num_bits=3, zero="float", group_size=16, scales=scales)
    count = quantized(grid, Full(), 64, 256).byte_count()
    assert count.bits_per_weight(64 * 256)["total"] == pytest.approx(expected)


def test_layouts_name_what_does_not_match() -> None:
    term = TERMS["five"]()
    layout, found = term.spec.layout(term.shape), described(term)
    assert bind(layout, found, "layer") == {"words": found["codes"][1][0]}
    for change, message in (
        ({"bitmap": None}, "'layer.bitmap' is missing"),
        ({"codes": (torch.int32, found["codes"][1])}, "'layer.codes' is torch.int32, expected torch.int64"),
        ({"codes": (torch.int64, (3, 3))}, r"'layer.codes' has shape \[3, 3\], expected \['words'\]"),
        ({"bitmap": (torch.int32, (7, 2))}, r"'layer.bitmap' has shape \[7, 2\], expected \[6, 2\]"),
        ({"scale": (None, (6, 3))}, "'layer.scale' is None"),
    ):
        changed = {name: entry for name, entry in {**found, **change}.items() if entry is not None}
        with pytest.raises(FormatError, match=message):
            bind(layout, changed, "layer")
    pair = quantized(GRIDS["int4-none"], Groups(size=16, index="csr"), 6, 40)
    shapes = described(pair)
    rows = shapes["scale"][1][0]
    with pytest.raises(FormatError, match="'layer"):
        bind(pair.spec.layout(pair.shape), {**shapes, "scale": (torch.float16, (rows + 1,))}, "layer")


def test_a_description_says_only_what_differs() -> None:
    spec = QuantizedSpec(grid=IntegerGrid(group_size=16))
    assert (
        isinstance(spec, TermSpec)
        and parse_spec({"type": "quantized", "grid": {"type": "integer", "group_size": 16}}) == spec
    )


def test_rotation_signs_are_a_bitmap() -> None:
    spec, tensors = inputs(40)["rotated"]
    assert spec.layout(40)["signs"].shape == (2,)
    assert packing.unpack_bitmap(tensors["signs"], 64)[40:].sum() == 0
