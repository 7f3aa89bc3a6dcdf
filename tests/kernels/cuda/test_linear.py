"""The CUDA kernels, run by this processor: every kind of code, scale and zero, and every way to cut the work up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LutGrid
from rarefy.formats.patterns import Groups
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms import Quantized, Sparse, Term
from rarefy.formats.terms.plain import Residual
from rarefy.kernels.activations import quantize_tokens
from rarefy.kernels.cuda.linear import _decode, terms_of
from rarefy.kernels.cuda.prepared import NotCovered, code_of, prepare
from rarefy.kernels.cuda.program import Tuning
from rarefy.kernels.prepared import flat
from tests.formats.samples import GRIDS, PATTERNS, mask_for, quantized, residual
from tests.kernels.cuda import emulation

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="there is no C++ compiler")

COVERED = [
    *(f"int{bits}-{zero}" for bits in range(2, 9) for zero in ("none", "integer", "float")),
    "int1-integer", "int1-float", "int4-bfloat16", "int4-float32", "int4-long", "int4-row", "level3-none",
    "level5-float", "binary1", "fp3", "fp4", "nf4", "nf4-row", "lut4-tensor", "lut3-row", "lut4-groups",
    "int8-g128", "int8-g128-integer", "int8-row", "fp8_e4m3-row", "fp8_e4m3-g64",
]  # fmt: skip
BILEVEL = {
    f"int{bits}-bilevel-{zero}": IntegerGrid(
        num_bits=bits, group_size=16, zero=zero, scales=BilevelScale(rows=rows, groups=groups)
    )
    for bits, zero, rows, groups in ((3, "float", 16, 1), (3, "none", 16, 2), (4, "float", 32, 3))
}
OTHERS: dict[str, Grid] = {
    "lut4-groups": LutGrid(num_bits=4, group_size=32), "int8-g128": IntegerGrid(num_bits=8, group_size=128),
    "int8-g128-integer": IntegerGrid(num_bits=8, group_size=128, zero="integer"), "int8-row": IntegerGrid(num_bits=8),
    "int4-g64-integer": IntegerGrid(num_bits=4, group_size=64, zero="integer"),
    "fp8_e4m3-row": FloatGrid(format="fp8_e4m3"), "fp8_e4m3-g64": FloatGrid(format="fp8_e4m3", group_size=64),
    **BILEVEL,
}  # fmt: skip
SMALL = Tuning(along=2, depth=1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def product(
    terms: list[Term], tuning: Tuning, tokens: int, dtype: torch.dtype = torch.float16, most: int = 1 << 30
) -> float:
    """The relative error of the product, by at most so many blocks."""
    made = [prepare(*term.operation()) for term in terms]  # type: ignore[misc]
    x = torch.randn(tokens, terms[0].columns).to(dtype)
    dense = sum(term.decode().double() for term in terms)
    return relative(emulation.linear(x, made, tuning, most), x.double() @ dense.T)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [*COVERED, *BILEVEL])
def test_every_covered_grid(name: str) -> None:
    grid = {**GRIDS, **OTHERS}[name]
    term = quantized(grid, PATTERNS["full"], 21, 300)
    made = prepare(*term.operation())
    assert torch.equal(_decode(*flat([made])), term.decode())
    assert product([term], Tuning(), 3) < 6e-4
    weight = emulation.dequantize(made, torch.float16)  # with what was compiled for the product
    if "pairs_half" in made.tensors:  # whose numbers are rounded first
        assert relative(weight, term.decode().double()) < 6e-4
    else:
        assert torch.equal(weight, term.decode().half())


@pytest.mark.parametrize(
    ("tuning", "tokens"),
    [
        (Tuning(1, 1, 1, 4, 2), 1), (Tuning(2, 1, 2, 1, 3), 11), (Tuning(4, 2, 1, 2, 1), 11),
        (Tuning(1, 2, 2, 2, 1, 2), 11), (Tuning(2, 1, 1, 2, 1, 3, 2), 1), (Tuning(1, 1, 1, 1, 4, 0, 3), 1),
        (Tuning(2, 2, 2, 1, 1, 4, 4), 11), (Tuning(1, 2, 8, 1, 1, 3, 2, wide=True), 11),
        (Tuning(2, 2, 8, 1, 2, 2, wide=True), 13), (Tuning(1, 4, 8, 1, 3, 2, wide=True, in_turns=True), 30),
        (Tuning(1, 1, 1, 2, 2, spread=True), 1), (Tuning(2, 1, 1, 4, 1, 0, 2, spread=True), 1),
    ],
    ids=str,
)  # fmt: skip
def test_every_way_to_cut_the_work_up(tuning: Tuning, tokens: int) -> None:
    term = quantized(GRIDS["int4-integer"], PATTERNS["full"], 50, 700)
    assert product([term], tuning, tokens, torch.bfloat16) < 4e-3
    assert product([term, residual(50, 700)], tuning, tokens) < 6e-4


@pytest.mark.parametrize(
    ("tuning", "tokens"),
    [
        (Tuning(along=2, depth=2, held=2), 2), (Tuning(2, 1, 2, 1, 1, held=4), 3), (Tuning(along=2, held=6), 5),
        (Tuning(2, 2, 1, 2, 1, 2), 5),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["int3-none", "int4-integer", "int8-none", "nf4", "binary1", *BILEVEL])
def test_small_groups_of_several_tokens(name: str, tuning: Tuning, tokens: int) -> None:
    """Lanes form each other's scales; two or four blocks take the places of eight tokens."""
    term = quantized({**GRIDS, **OTHERS}[name], PATTERNS["full"], 37, 600)
    assert prepare(*term.operation()).numbers["group_size"] == 16  # type: ignore[misc]
    assert product([term, residual(37, 600)], tuning, tokens) < 6e-4
    assert product([term], tuning, tokens, torch.bfloat16) < 4e-3


@pytest.mark.parametrize(
    ("tuning", "tokens"),
    [
        (Tuning(1, 1, 1, 2, 2, spread=True), 1), (Tuning(2, 1, 2, 1, 3), 11),
        (Tuning(1, 1, 2, 1, 2, held=6), 5), (Tuning(2, 2, 1, 2, 1, held=12), 11),
        (Tuning(1, 2, 8, 1, 1, 3, 2, wide=True), 11),
    ],
    ids=str,
)  # fmt: skip
def test_outliers_of_long_rows(tuning: Tuning, tokens: int) -> None:
    """What no quad has room for follows in a list."""
    chosen = torch.rand(50, 700) < 0.02
    chosen[[3, 12, 49]] |= torch.rand(3, 700) < 0.5
    outliers = Residual.from_weight(torch.randn(50, 700), chosen)
    made = prepare(*outliers.operation())  # type: ignore[misc]
    assert made.tensors["rest"].numel() > 300 and made.tensors["entries"].numel() > 500
    assert product([quantized(GRIDS["int4-integer"], PATTERNS["full"], 50, 700), outliers], tuning, tokens) < 6e-4


EVERY_KIND = [
    "int3-float", "int5-integer", "int8-g128", "int8-g128-integer", "fp8_e4m3-g64", "int4-none", "int4-row",
    "lut3-row", "lut4-groups", "nf4", "binary1", *BILEVEL,
]  # fmt: skip


@pytest.mark.parametrize("name", EVERY_KIND)
def test_four_warps_at_once(name: str) -> None:
    grid = {**GRIDS, **OTHERS}[name]
    assert product([quantized(grid, PATTERNS["full"], 70, 300)], Tuning(1, 2, 4, 1, 1, 2, wide=True), 13) < 6e-4


PROMPT = Tuning(2, 8, depth=1, stages=3, wide=True, unpackers=1)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_unpacked_for_others(name: str) -> None:
    grid = {**GRIDS, **OTHERS}[name]
    assert product([quantized(grid, PATTERNS["full"], 70, 300)], PROMPT, 13) < 6e-4


@pytest.mark.parametrize(
    ("changes", "rows", "columns", "tokens", "most"),
    [
        ({"tokens": 32, "depth": 2, "stages": 4}, 151, 777, 270, 1), ({"tiles": 1, "unpackers": 2}, 264, 640, 70, 2),
        ({"tokens": 24, "stages": 3}, 136, 200, 200, 3), ({"split": 4}, 133, 700, 70, 9),
        ({"tokens": 16, "split": 2, "stages": 3}, 136, 640, 130, 9), ({"tokens": 16}, 300, 200, 150, 2),
        ({"split": 4}, 1, 9, 1, 9), ({}, 1, 1, 1, 1),
    ],
    ids=str,
)  # fmt: skip
def test_every_form_of_prompts(changes: dict[str, Any], rows: int, columns: int, tokens: int, most: int) -> None:
    """One block for many tiles, blocks that share columns, rows and tokens that fill no tile."""
    term = quantized(GRIDS["int4-integer"], PATTERNS["full"], rows, columns)
    assert product([term], replace(PROMPT, **changes), tokens, torch.bfloat16, most) < 4e-3


@pytest.mark.parametrize("name", EVERY_KIND)
def test_blocks_of_one_token_in_the_places_of_eight(name: str) -> None:
    grid = {**GRIDS, **OTHERS}[name]
    term = quantized(grid, PATTERNS["full"], 37, 600)
    assert product([term, residual(37, 600)], Tuning(2, 1, 1, 2, 1, spread=True), 1) < 6e-4


@pytest.mark.parametrize("name", [name for name in EVERY_KIND if not name.startswith(("int8", "fp8"))])
def test_weights_of_one_token_in_shared_memory(name: str) -> None:
    grid = {**GRIDS, **OTHERS}[name]
    term = quantized(grid, PATTERNS["full"], 37, 640)
    made = prepare(*term.operation())  # type: ignore[misc]
    code = code_of(*terms_of(*flat([made])[:3])[0][:2])
    for tuning in (Tuning(2, 1, 1, 2, 1, spread=True, stored=True), Tuning(1, split=2, spread=True, stored=True)):
        if code.can_be_stored(640, tuning.split):
            assert product([term, residual(37, 640)], tuning, 1) < 6e-4
    assert code.can_be_stored(640, 1)


@pytest.mark.parametrize(
    "grid",
    [
        BinaryGrid(group_size=128), BinaryGrid(group_size=512), BinaryGrid(group_size=None),
        IntegerGrid(num_bits=1, group_size=128, zero="integer"), IntegerGrid(num_bits=1, group_size=256, zero="float"),
    ],
    ids=lambda grid: f"{grid.type}-{grid.group_size}",
)  # fmt: skip
@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(along=2, depth=1, spread=True), Tuning(2, 1, 2, 1, 2, spread=True), Tuning(1, 1, 2, 2, 4, spread=True),
        Tuning(2, 1, 1, 1, 2, split=3, spread=True), Tuning(2, 1, 1, 2, 2, spread=True, stored=True),
        Tuning(1, 1, 2, 1, 4, spread=True, stored=True), Tuning(2, 1, 1, 1, 2, split=3, spread=True, stored=True),
    ],
    ids=str,
)  # fmt: skip
def test_one_token_in_bit_planes(grid: Grid, tuning: Tuning) -> None:
    """Its numbers are whole ones there, in as many bits as sums in float32 keep: nothing is lost but what rounding the
    result takes, even where some numbers are a thousand times the others."""
    term = quantized(grid, PATTERNS["full"], 37, 2900)
    made = [prepare(*term.operation())]  # type: ignore[misc]
    x = torch.randn(1, 2900) / 100
    x[:, ::97] *= 1000
    x[:, 600:900] = 0
    for dtype in (torch.float16, torch.bfloat16):
        expected = x.to(dtype).double() @ term.decode().double().T
        rounding = relative(expected.to(dtype), expected)
        assert relative(emulation.linear(x.to(dtype), made, tuning), expected) < 1.02 * rounding + 1e-6


def test_bit_planes_of_what_is_no_number() -> None:
    term = quantized(BinaryGrid(group_size=128), PATTERNS["full"], 16, 300)
    made, tuning = [prepare(*term.operation())], Tuning(along=2, depth=1, spread=True)  # type: ignore[misc]
    for number in (torch.inf, -torch.inf, torch.nan):
        x = torch.randn(1, 300).bfloat16()
        x[0, 200] = number
        assert not emulation.linear(x, made, tuning).isfinite().any()
    for size in (1e-30, 1e30):
        x = torch.full((1, 300), size).bfloat16()
        expected = x.double() @ term.decode().double().T
        assert relative(emulation.linear(x, made, tuning), expected) < 4e-3


def test_bit_planes_beside_outliers() -> None:
    term = quantized(BinaryGrid(group_size=128), PATTERNS["full"], 37, 600)
    assert product([term, residual(37, 600)], Tuning(2, 1, 1, 2, 2, spread=True), 1) < 6e-4


def test_sums_in_units_of_the_last_scale() -> None:
    """Some of which are zero, and others a thousand times larger."""
    rows, columns = 40, 640
    grid = IntegerGrid(num_bits=4, group_size=128)
    scale = torch.rand(rows, columns // 128).half() * torch.tensor([1.0, 0.0, 1e-3, 30.0, 1.0]).half()
    scale[7] = 0
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    term = Quantized.from_codes(codes, {"scale": scale}, grid)
    assert product([term], Tuning(1, 2, 4, 1, 1, 2, wide=True, rescaled=True), 13) < 6e-4


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 128), (17, 129), (3, 263)])
def test_odd_shapes(rows: int, columns: int) -> None:
    for name in ("int3-float", "int8-none"):
        assert product([quantized(GRIDS[name], PATTERNS["full"], rows, columns)], SMALL, 2) < 6e-4


def test_what_no_kernel_reads_is_named() -> None:
    for name, reason in (("fp6_e2m3", "fp6"), ("lut2-rows", "tables of 4 entries"), ("fp4-two", "each sign")):
        with pytest.raises(NotCovered, match=reason):
            prepare(*quantized(GRIDS[name], PATTERNS["full"], 8, 64).operation())
    with pytest.raises(NotCovered, match="pattern"):
        prepare(*quantized(GRIDS["int3-none"], PATTERNS["bitmap"], 4, 64).operation())



@pytest.mark.parametrize("name", ["int4-none", "int4-row", "int3-float", "int8-g128-integer", "binary1", *BILEVEL])
def test_codes_become_bytes(name: str) -> None:
    """Of E4M3, which keeps three bits after the first; no row's largest number, 448 steps, exceeds what there is."""
    term = quantized({**GRIDS, **OTHERS}[name], PATTERNS["full"], 37, 320)
    weight, step = emulation.dequantize_to_bytes(prepare(*term.operation()))  # type: ignore[arg-type]
    wanted = term.decode()
    values = weight.float() * step[:, None]
    assert torch.all((values - wanted).abs() <= wanted.abs() / 16 * 1.001 + step[:, None] / 2)
    assert torch.all(wanted.abs().amax(1) <= step * 448 * 1.001)
    if "bilevel" not in name and name != "binary1":  # whose zeros are no codes
        assert torch.all(values[wanted == 0] == 0)


@pytest.mark.parametrize("normed", [False, True])
def test_tokens_in_eight_bits(normed: bool) -> None:
    x = torch.randn(3, 520).bfloat16() * torch.tensor([[1.0], [1e-4], [0.0]]).bfloat16()
    gain = torch.rand(520).bfloat16() + 0.5 if normed else None
    (codes, step), (wanted, wanted_step) = (f(x, gain, 1e-6) for f in (emulation.quantize_tokens, quantize_tokens))
    torch.testing.assert_close(step, wanted_step, rtol=1e-5, atol=0)
    same = codes.view(torch.uint8) == wanted.view(torch.uint8)
    assert float(same.float().mean()) > 0.99  # others lie at the middle between two numbers
    values, wanted_values = (c.float() * s[:, None] for c, s in ((codes, step), (wanted, wanted_step)))
    torch.testing.assert_close(values, wanted_values, rtol=0.13, atol=1e-9)


def sparse_product(term: Term) -> None:
    made = prepare(*term.operation())  # type: ignore[misc]
    assert torch.equal(_decode(*flat([made])), term.decode())
    for tokens, dtype, most in ((1, torch.bfloat16, 4e-3), (3, torch.float16, 1e-3)):
        x = (torch.randn(tokens, term.columns) * 50).to(dtype)
        assert relative(emulation.sparse(x, made), x.double() @ term.decode().double().T) < most


@pytest.mark.parametrize(
    ("index", "zero", "size"), [("ids", "none", 16), ("csr", "integer", 16), ("bitmap", "float", 32)]
)
def test_kept_groups(index: str, zero: str, size: int) -> None:
    grid = IntegerGrid(num_bits=4, group_size=size, zero=zero)  # type: ignore[arg-type]
    sparse_product(quantized(grid, Groups(size=size, index=index), 43, 37 * 32))  # type: ignore[arg-type]


def test_kept_groups_of_wide_rows() -> None:
    """More pieces than a byte counts; rows that keep nothing, others nearly all."""
    rows, columns = 19, 300 * 16
    chosen = torch.rand(rows, columns // 16) < torch.linspace(0, 1, rows)[:, None]
    grid, own = IntegerGrid(num_bits=4, group_size=16), Groups(size=16, index="csr")
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    params = {"scale": torch.rand(rows, columns // 16).half()}

    def term_of(chosen: Tensor) -> Quantized:
        return Quantized.from_codes(codes, params, grid, pattern=own, mask=chosen.repeat_interleave(16, 1))

    sparse_product(term_of(chosen | (torch.arange(columns // 16) % 30 == 29) & (torch.arange(rows) > 0)[:, None]))
    apart = torch.zeros_like(chosen)
    apart[3, [0, 299]] = True
    with pytest.raises(NotCovered, match="columns apart"):
        prepare(*term_of(apart).operation())


@pytest.mark.parametrize(
    ("pattern", "grid"),
    [("bitmap", "int4-integer"), ("2:4", "int8-float"), ("2:4-rank", "int2-none"), ("bitmap", "int4-row")],
)
def test_masked_codes(pattern: str, grid: str) -> None:
    sparse_product(quantized(GRIDS[grid], PATTERNS[pattern], 43, 1100 if pattern == "bitmap" else 300))


@pytest.mark.parametrize("grid", ["int4-integer", "int8-float", "int4-none", "int4-row", "values"])
def test_two_of_four(grid: str) -> None:
    own, columns = PATTERNS["2:4-rank"], 1200
    weight, mask = torch.randn(37, columns), mask_for(own, 37, columns)
    term = Sparse.from_weight(weight, mask, own) if grid == "values" else quantized(GRIDS[grid], own, 37, columns)  # type: ignore[arg-type]
    made = prepare(*term.operation())  # type: ignore[misc]
    assert made.numbers["two_of_four"] == (grid == "values" or term.spec.grid.group_size in (None, 16, 32, 128))
    sparse_product(term)


@pytest.mark.parametrize("pattern", ["bitmap", "3:7", "4:8-rank"])
def test_masked_values(pattern: str) -> None:
    own = PATTERNS[pattern]
    sparse_product(Sparse.from_weight(torch.randn(21, 300), mask_for(own, 21, 300), own, "bfloat16"))
