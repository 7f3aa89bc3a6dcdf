"""Native kernels against the reference in float64: every representation, shape and instruction set."""

from __future__ import annotations

import os
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import FormatError
from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LevelGrid, LutGrid
from rarefy.formats.layout import FloatName
from rarefy.formats.patterns import Bitmap, Pattern
from rarefy.formats.scales import BilevelScale, SingleScale
from rarefy.formats.terms import Quantized, Residual, Sparse, Term
from rarefy.formats.terms.base import op_arguments
from rarefy.kernels.cpu import library
from rarefy.kernels.cpu.linear import check, decode, linear
from rarefy.kernels.cpu.prepared import CODES, ENTRIES, NotCovered, Prepared, prepare
from tests.formats.samples import GRIDS, PATTERNS, mask_for, quantized

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library was not built")

ISAS = library.supported()
# One row, one column, ragged tiles, units, panels and groups; more tokens than are multiplied one by one, or at once.
SHAPES = [(1, 1), (5, 40), (17, 77), (33, 129), (48, 320)]
TOKENS = (1, 2, 3, 7, 131)

# Grids whose groups are those of today's recipes; GRIDS has all kinds with groups of 16.
LARGER: dict[str, Grid] = {
    **{f"int{bits}-g128": IntegerGrid(num_bits=bits, zero="integer", group_size=128) for bits in range(1, 9)},
    "int4-g32-float": IntegerGrid(zero="float", group_size=32),
    "int4-g64-none": IntegerGrid(zero="none", group_size=64),
    "int3-spqr": IntegerGrid(num_bits=3, zero="float", group_size=16, scales=BilevelScale()),
    "int4-g96": IntegerGrid(zero="integer", group_size=96),
    "int2-g20": IntegerGrid(num_bits=2, zero="integer", group_size=20),
    "ternary-g128": LevelGrid(levels=3, group_size=128),
    "nf4-g128": FloatGrid(format="nf4", group_size=128),
    "nf4-two-g128": FloatGrid(format="nf4", two_scales=True, group_size=128),
    "fp4-two-g64": FloatGrid(format="fp4", two_scales=True, group_size=64, scales=SingleScale(dtype="bfloat16")),
    "nf3-two-g32": FloatGrid(format="nf3", two_scales=True, group_size=32),
    "fp8-g128": FloatGrid(format="fp8_e4m3", group_size=128),
    "fp8-two-g64": FloatGrid(format="fp8_e5m2", two_scales=True, group_size=64),
    "fp6-two-g32": FloatGrid(format="fp6_e2m3", two_scales=True, group_size=32),
    "lut4-row": LutGrid(num_bits=4),
    "lut3-tensor": LutGrid(num_bits=3, rows_per_lut=None),
    "lut4-g128": LutGrid(num_bits=4, group_size=128, dtype="bfloat16"),
    "binary-g128": BinaryGrid(group_size=128),
    "binary2-g128": BinaryGrid(group_size=128, regions=2),
}
ALL = {**GRIDS, **LARGER}

# What no native kernel reads, and therefore runs in torch: look-up tables in short groups or of many entries.
NOT_COVERED = {"lut2-groups", "lut8-row", "binary2", "binary3", "binary4"}


def arguments(term: Term) -> tuple[str, tuple[Any, ...]]:
    if isinstance(term, Residual):
        return "csr", op_arguments(term, ("entries", "row_ptr"), term._plain)
    assert isinstance(term, Quantized | Sparse)
    return getattr(term, "family", "values"), op_arguments(term, term._names, term._plain)


def seeded(*what: object) -> None:
    torch.manual_seed(zlib.crc32(repr(what).encode()))


def ready(term: Term) -> Prepared:
    made = prepare(*arguments(term))
    check(made)
    return made


def residual(rows: int, columns: int, share: float = 0.1) -> Residual:
    return Residual.from_weight(torch.randn(rows, columns), torch.rand(rows, columns) < share)


def sparse(pattern: Pattern, rows: int, columns: int, dtype: FloatName = "float16") -> Sparse:
    weight, mask = torch.randn(rows, columns), mask_for(pattern, rows, columns)
    return Sparse.from_weight(weight, mask, pattern, dtype)


def rounded(x: Tensor, block: int) -> Tensor:
    """What ``fast`` makes of activations: 8-bit codes for each token and block of columns."""
    whole = torch.nn.functional.pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    top = whole.abs().amax(-1, keepdim=True)
    codes = torch.round(whole * torch.where(top > 0, torch.full_like(top, 127) / top, 0.0))
    return (codes.double() * (top / 127).double()).flatten(1)[:, : x.shape[1]]


def block_of(made: Prepared) -> int:
    size, columns = made.numbers["group_size"], made.columns
    return 128 if size >= columns else min(128, size & -size)


def hold(terms: list[Term], rows: int, columns: int) -> None:
    made = [ready(term) for term in terms]
    dense = torch.stack([term.decode() for term in terms]).sum(0)
    alone = len(terms) == 1
    # Zero points are taken off sums: a weight far below its row's largest loses bits to that one's rounding.
    step = dense.double().abs().amax(1, keepdim=True) / 4
    for isa in ISAS:
        with library.using(isa):
            native = decode(made)
            assert torch.equal(native, dense) if alone else torch.allclose(native, dense, rtol=1e-6, atol=1e-6), isa
            for tokens in TOKENS:
                x = torch.randn(tokens, columns)
                reach = x.double().abs() @ (dense.double().abs() + step).T + 1e-30
                exact = (linear(x, made).double() - x.double() @ dense.double().T).abs() / reach
                assert float(exact.max()) < (2e-6 if columns > 1 else 2e-5), (isa, tokens, float(exact.max()))
                if not made[0].multiplies_bytes:
                    torch.testing.assert_close(linear(x, made, fast=True), linear(x, made), rtol=1e-4, atol=1e-4)
                    continue
                parts = [rounded(x, block_of(made[0])), *(x.double() for _ in terms[1:])]
                wanted = sum(part @ term.decode().double().T for part, term in zip(parts, terms, strict=True))
                fast = (linear(x, made, fast=True).double() - wanted).abs() / reach
                # Codes are whole; entries of a table that are not are held to 14 bits of its range.
                limit = 4e-4 if "table" in made[0].tensors else 1e-5
                assert float(fast.max()) < limit, (isa, tokens, float(fast.max()))


@pytest.mark.parametrize("name", [name for name in ALL if name not in NOT_COVERED])
def test_every_grid(name: str) -> None:
    seeded(name)
    for rows, columns in SHAPES:
        hold([quantized(ALL[name], PATTERNS["full"], rows, columns)], rows, columns)


@pytest.mark.parametrize("pattern", ["bitmap", "2:4", "2:4-rank", "4:8-rank", "3:7"])
@pytest.mark.parametrize(
    "name", ["int4-g128", "int8-g128", "int2-g128", "int4-row", "nf4-g128", "fp4-two-g64", "nf3-two-g32", "fp8-two-g64"]
)
def test_codes_under_a_mask(name: str, pattern: str) -> None:
    seeded(name, pattern)
    for rows, columns in SHAPES[1:]:
        hold([quantized(ALL[name], PATTERNS[pattern], rows, columns)], rows, columns)


@pytest.mark.parametrize("index", ["groups-ids", "groups-csr", "groups-bitmap"])
@pytest.mark.parametrize("name", ["int4-integer", "int4-float", "int2-none", "int3-integer", "int8-integer"])
def test_kept_groups(name: str, index: str) -> None:
    seeded(name, index)
    for rows, columns in SHAPES[1:]:
        hold([quantized(GRIDS[name], PATTERNS[index], rows, columns)], rows, columns)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("pattern", ["bitmap", "2:4", "2:4-rank", "3:7"])
def test_values_under_a_mask(pattern: str, dtype: FloatName) -> None:
    seeded(pattern, dtype)
    for rows, columns in SHAPES[1:]:
        hold([sparse(PATTERNS[pattern], rows, columns, dtype)], rows, columns)


@pytest.mark.parametrize("name", ["int3-g128", "int3-spqr", "lut4-row", "nf4-g128"])
def test_outliers_are_added_in_the_same_pass(name: str) -> None:
    seeded(name)
    for rows, columns in SHAPES:
        base = quantized(ALL[name], PATTERNS["full"], rows, columns)
        hold([base, residual(rows, columns)], rows, columns)
    hold([residual(40, 300, 0.01)], 40, 300)
    hold([quantized(ALL[name], PATTERNS["full"], 33, 129), residual(33, 129), residual(33, 129, 0.01)], 33, 129)


def test_outliers_beyond_65536_columns() -> None:
    rows, columns = 3, 70000
    hold([residual(rows, columns, 0.001)], rows, columns)


def test_outliers_in_any_order_come_back_or_are_refused() -> None:
    seeded("order")
    for share in (0.0, 0.02, 0.5, 1.0):
        term = residual(37, 90, share)
        family, given = arguments(term)
        made = prepare(family, given)
        assert all(torch.equal(a, b) for a, b in zip(made.canonical()[:2], given[:2], strict=True))
    entries, row_ptr, *rest = given
    with pytest.raises(NotCovered, match="do not rise"):
        prepare(family, (entries.flip(0), row_ptr, *rest))
    with pytest.raises(NotCovered, match="row pointers"):
        prepare(family, (entries[:5], row_ptr, *rest))


@pytest.mark.parametrize("name", sorted(NOT_COVERED))
def test_what_is_not_covered_says_so(name: str) -> None:
    with pytest.raises(NotCovered):
        prepare(*arguments(quantized(ALL[name], PATTERNS["full"], 17, 77)))


def test_16_bit_activations_and_strides() -> None:
    seeded("strides")
    made = [ready(quantized(ALL["int4-g128"], PATTERNS["full"], 33, 129))]
    dense = decode(made).double()
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        wide = torch.randn(5, 300).to(dtype)
        for x in (wide[:, :129], torch.randn(129, 5).to(dtype).t(), torch.randn(2, 3, 129).to(dtype), wide[0, :129]):
            y = linear(x, made)
            assert y.dtype == dtype and y.shape == (*x.shape[:-1], 33)
            torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=tolerance, atol=tolerance * 10)
    assert linear(torch.randn(0, 129), made).shape == (0, 33)


def test_a_number_that_is_not_finite_reaches_every_output() -> None:
    made = [ready(quantized(ALL["int4-g128"], PATTERNS["full"], 20, 200))]
    x = torch.randn(2, 200)
    x[1, 150] = torch.nan
    for isa in ISAS:
        with library.using(isa):
            for fast in (False, True):
                y = linear(x, made, fast)
                assert torch.isfinite(y[0]).all() and torch.isnan(y[1]).all()


def test_threads_change_nothing() -> None:
    seeded("threads")
    made = [ready(quantized(ALL["int4-g128"], PATTERNS["full"], 700, 300))]
    x, before = torch.randn(9, 300), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append([linear(x, made, fast) for fast in (False, True) for _ in range(20)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_a_child_of_fork_has_threads_of_its_own() -> None:
    made, x = [ready(quantized(ALL["int4-g128"], PATTERNS["full"], 700, 300))], torch.randn(2, 300)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = linear(x, made)
        child = os.fork()
        if child == 0:
            os._exit(0 if all(torch.equal(linear(x, made), expected) for _ in range(20)) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_the_op_keeps_its_contract_with_torch() -> None:
    from rarefy.kernels.prepared import flat as flattened

    flat = flattened([ready(quantized(ALL["int4-g128"], PATTERNS["full"], 6, 40)), ready(residual(6, 40))])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x = torch.randn(3, 40, requires_grad=True)
    torch.library.opcheck(torch.ops.rarefy.linear_prepared.default, (x, *flat, False), test_utils=checks)
    torch.library.opcheck(torch.ops.rarefy.decode_prepared.default, flat, test_utils=checks)
    (gradient,) = torch.autograd.grad(torch.ops.rarefy.linear_prepared(x, *flat, False).sum(), x)
    torch.testing.assert_close(gradient, torch.ops.rarefy.decode_prepared(*flat).sum(0).expand(3, -1))


def test_tensors_of_a_wrong_size_are_refused() -> None:
    cases = {
        name: quantized(ALL[name], PATTERNS["full"], 33, 129)
        for name in ("int4-g128", "int3-spqr", "nf4-g128", "lut4-row", "binary-g128")
    }
    cases["bitmap"] = quantized(ALL["int8-g128"], Bitmap(), 33, 129)  # type: ignore[assignment]
    cases["groups"] = quantized(GRIDS["int4-integer"], PATTERNS["groups-csr"], 33, 129)
    terms: dict[str, Term] = {**cases, "values": sparse(Bitmap(), 33, 129), "csr": residual(33, 129)}
    x = torch.randn(2, 129)
    for term in terms.values():
        made = ready(term)
        for slot, tensor in list(made.tensors.items()):
            for wrong in (tensor.flatten()[:-1], torch.cat([tensor.flatten(), tensor.flatten()[:1]]), tensor[:0]):
                if slot == "codes" and made.numbers["kind"] == ENTRIES and wrong.numel() > tensor.numel():
                    continue  # entries may be more than pointers use
                if slot == "table" and wrong.numel() == 0 and made.numbers["kind"] == CODES:
                    continue  # codes without a table are integers
                made.tensors[slot] = wrong.contiguous()
                with pytest.raises(FormatError):
                    check(made)
            made.tensors[slot] = tensor
        with pytest.raises(FormatError, match="128 channels"):
            linear(x[:, :128], [made])
        linear(x, [made])
    small, other = ready(cases["int4-g128"]), ready(residual(33, 130))
    with pytest.raises(FormatError, match="Term 1 is 33 x 130"):
        linear(x, [small, other])
