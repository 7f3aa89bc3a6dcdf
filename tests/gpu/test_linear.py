"""Compressed layers on a GPU against their own decoded weights; every covered grid, odd shapes, graphs, gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LutGrid
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms import Quantized, Residual, Sparse
from rarefy.kernels import native
from rarefy.kernels.activations import quantize_tokens, reference
from rarefy.kernels.cuda import tuning
from rarefy.kernels.cuda.program import Tuning
from rarefy.layers.execution import in_torch
from rarefy.layers.linear import CompressedLinear
from tests.formats.samples import GRIDS, PATTERNS, mask_for, quantized, residual

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

GPU = torch.device("cuda", 0)
OTHERS: dict[str, Grid] = {
    "spqr": IntegerGrid(num_bits=3, group_size=16, zero="float", scales=BilevelScale()),
    "int4-g64-integer": IntegerGrid(num_bits=4, group_size=64, zero="integer"),
    "int8-g128": IntegerGrid(num_bits=8, group_size=128), "fp8": FloatGrid(format="fp8_e4m3"),
    "lut4-groups": LutGrid(num_bits=4, group_size=32),
}  # fmt: skip
COVERED = [
    "int4-none", "int4-integer", "int4-float32", "int3-float", "int2-none", "int1-integer", "int6-none", "int7-integer",
    "int8-g128", "fp8", "spqr", "level5-float", "binary1", "nf4", "lut4-tensor", "lut3-row", "lut4-groups",
]  # fmt: skip


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def checked(layer: CompressedLinear, x: Tensor, most: float = 6e-4) -> None:
    expected = x.double() @ layer.decode().double().T
    layer.prepare_()
    assert all(part.is_prepared for part in layer.terms)
    # Half of a bfloat16's last place on each weight of a table, and on each result.
    assert relative(layer(x), expected) < (4e-3 if x.dtype == torch.bfloat16 else most)


# Each number of tokens has a kernel of its own; wgmma takes 40 and 600.
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(1, torch.bfloat16), (3, torch.float16), (16, torch.bfloat16), (40, torch.float16), (600, torch.bfloat16),
     (1100, torch.float16)],
)
@pytest.mark.parametrize("grid", COVERED)
def test_every_covered_grid(grid: str, tokens: int, dtype: torch.dtype) -> None:
    term = quantized({**GRIDS, **OTHERS}[grid], PATTERNS["full"], 77, 520)
    checked(CompressedLinear([term], dtype=dtype).to(GPU), torch.randn(tokens, 520, device=GPU, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("pattern", ["groups-ids", "groups-csr", "groups-bitmap", "bitmap", "2:4", "2:4-rank"])
def test_what_is_kept(pattern: str, tokens: int) -> None:
    own = PATTERNS[pattern]
    terms = [quantized(IntegerGrid(num_bits=4, group_size=16, zero="integer"), own, 100, 640)]
    if not pattern.startswith("groups"):
        terms.append(Sparse.from_weight(torch.randn(100, 640), mask_for(own, 100, 640), own))  # type: ignore[arg-type]
    for term in terms:
        # Four products of kept groups are summed in float16.
        checked(CompressedLinear([term]).to(GPU), torch.randn(tokens, 640, device=GPU, dtype=torch.float16), 2e-3)


def test_products_of_bytes() -> None:
    layer = CompressedLinear([quantized(OTHERS["fp8"], PATTERNS["full"], 256, 512)]).to(GPU)
    layer.terms[0].fast = True
    x = torch.randn(128, 512, device=GPU, dtype=torch.bfloat16)
    expected = x.double() @ layer.decode().double().T
    assert 5e-3 < relative(layer(x), expected) < 5e-2  # three bits of mantissa
    assert relative(layer(x[:8]), expected[:8]) < 4e-3
    gain = torch.rand(512, device=GPU, dtype=torch.bfloat16)
    for own in (None, gain):
        (codes, step), (wanted, wanted_step) = quantize_tokens(x, own, 1e-6), reference(x, own, 1e-6)
        torch.testing.assert_close(step, wanted_step, rtol=1e-5, atol=0)
        assert float((codes.view(torch.uint8) == wanted.view(torch.uint8)).float().mean()) > 0.99


@pytest.mark.parametrize("grid", ["int4-none", "int3-float", "int8-g128", "spqr", "binary1"])
def test_integers_become_bytes(grid: str) -> None:
    """For many tokens, rounded once more; for fewer `fast` execution changes nothing."""
    layer = CompressedLinear([quantized({**GRIDS, **OTHERS}[grid], PATTERNS["full"], 256, 512)]).to(GPU)
    layer.terms[0].fast = True
    x = torch.randn(600, 512, device=GPU, dtype=torch.bfloat16)
    expected = x.double() @ layer.decode().double().T
    assert 5e-3 < relative(layer(x), expected) < 6e-2
    assert relative(layer(x[:200]), expected[:200]) < 4e-3


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 16), (17, 129), (300, 1027), (4096, 4096)])
@pytest.mark.parametrize("tokens", [1, 7, 64, 513])
def test_odd_shapes(rows: int, columns: int, tokens: int) -> None:
    layer = CompressedLinear([quantized(GRIDS["int4-integer"], PATTERNS["full"], rows, columns)]).to(GPU)
    checked(layer, torch.randn(tokens, columns, device=GPU, dtype=torch.float16))


@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 100, 300])
def test_outliers_are_added(tokens: int) -> None:
    terms = [quantized(GRIDS["int3-float"], PATTERNS["full"], 100, 640), residual(100, 640)]
    checked(CompressedLinear(terms).to(GPU), torch.randn(tokens, 640, device=GPU, dtype=torch.float16))


@pytest.mark.parametrize("tokens", [2, 3, 4, 7, 8, 9, 16])
@pytest.mark.parametrize("grid", ["spqr", "int3-none", "int4-integer", "nf4", "binary1"])
def test_small_groups_of_several_tokens(grid: str, tokens: int) -> None:
    """Lanes form each other's scales; outliers meet tokens in shared memory, or not all of them."""
    for columns in (1100, 17000):
        terms = [quantized({**GRIDS, **OTHERS}[grid], PATTERNS["full"], 200, columns), residual(200, columns)]
        layer = CompressedLinear(terms).to(GPU)
        x = torch.randn(tokens, columns, device=GPU, dtype=torch.bfloat16)
        checked(layer, x)
        first = layer(x)
        assert all(torch.equal(layer(x), first) for _ in range(20))


WIDE = Tuning(1, 4, 8, 1, 2, 4, wide=True, overlap=True)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="not Hopper")
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"across": 4, "depth": 3}, {"across": 12}, {"tiles": 2}, {"tokens": 16, "in_turns": True}, {"cluster": 2},
        {"depth": 4},
        {"split": 4}, {"cluster": 2, "split": 2},
        {"tokens": 32, "rescaled": True, "stages": 3}, {"overlap": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_form_of_four_warps_together(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "choose", lambda *arguments: replace(WIDE, **changes))
    layer = CompressedLinear([quantized(GRIDS["int4-none"], PATTERNS["full"], 700, 1100)]).to(GPU)
    x = torch.randn(150, 1100, device=GPU, dtype=torch.float16)
    checked(layer, x)
    first = layer(x)
    assert all(torch.equal(layer(x), first) for _ in range(20))


PROMPT = Tuning(2, 32, depth=2, stages=4, wide=True, overlap=True, unpackers=1)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="not Hopper")
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"overlap": False}, {"split": 4}, {"depth": 1, "stages": 3},
        {"tokens": 24, "tiles": 1, "unpackers": 2, "depth": 3}, {"tokens": 24, "tiles": 1, "unpackers": 2, "split": 2},
    ],
    ids=str,
)  # fmt: skip
def test_every_form_of_prompts(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "choose", lambda *arguments: replace(PROMPT, **changes))
    layer = CompressedLinear([quantized(GRIDS["int4-none"], PATTERNS["full"], 700, 1100)]).to(GPU)
    for tokens in (150, 700):
        x = torch.randn(tokens, 1100, device=GPU, dtype=torch.float16)
        checked(layer, x)
        first = layer(x)
        assert all(torch.equal(layer(x), first) for _ in range(20))


@pytest.mark.parametrize("grid", ["int4-none", "int8-g128"])
def test_long_prompts(grid: str) -> None:
    """More tiles than a GPU has processors, a view of tokens, tokens that are all the same one."""
    layer = CompressedLinear([quantized({**GRIDS, **OTHERS}[grid], PATTERNS["full"], 8100, 1024)]).to(GPU)
    checked(layer, torch.randn(1000, 2048, device=GPU, dtype=torch.float16)[:, 512:1536])
    checked(layer, torch.randn(1, 1024, device=GPU, dtype=torch.float16).expand(600, -1))


ONE, PLANES = Tuning(1, 1, 1, 4, 2, spread=True, overlap=True), BinaryGrid(group_size=128)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="before Hopper")
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"along": 16}, {"tiles": 4, "depth": 1}, {"tiles": 2, "across": 2}, {"stored": True},
        {"stored": True, "tiles": 2, "across": 2, "depth": 1}, {"stored": True, "split": 2},
    ],
    ids=str,
)  # fmt: skip
def test_every_form_of_one_token(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "choose", lambda *arguments: replace(ONE, **changes))
    x = torch.randn(1, 3000, device=GPU, dtype=torch.float16)
    for terms in ([quantized(GRIDS["int3-float"], PATTERNS["full"], 700, 3000), residual(700, 3000)],
                  [quantized(GRIDS["binary1"], PATTERNS["full"], 700, 3000)],
                  [quantized(PLANES, PATTERNS["full"], 700, 3000), residual(700, 3000)]):  # fmt: skip
        layer = CompressedLinear(terms).to(GPU)
        checked(layer, x)
        first = layer(x)
        assert all(torch.equal(layer(x), first) for _ in range(20))


@pytest.mark.parametrize(("rows", "columns"), [(77, 520), (700, 3000), (9000, 1024), (4096, 14336)])
def test_one_token_in_bit_planes(rows: int, columns: int) -> None:
    """Nothing is lost but what rounding the result takes, even where some numbers are a thousand times the others."""
    layer = CompressedLinear([quantized(PLANES, PATTERNS["full"], rows, columns)]).to(GPU)
    x = torch.randn(1, columns, device=GPU) / 100
    x[:, ::97] *= 1000
    for dtype in (torch.float16, torch.bfloat16):
        expected = x.to(dtype).double() @ layer.decode().double().T
        layer.prepare_()
        assert relative(layer(x.to(dtype)), expected) < 1.05 * relative(expected.to(dtype), expected) + 1e-6


def test_inputs_of_any_form() -> None:
    layer = CompressedLinear([quantized(GRIDS["int4-none"], PATTERNS["full"], 64, 256)], torch.randn(64)).to(GPU)
    x = torch.randn(2, 3, 512, device=GPU, dtype=torch.float16)[..., ::2]
    expected = x.double() @ layer.decode().double().T + layer.bias.double()  # type: ignore[union-attr]
    assert relative(layer(x), expected) < 1e-3
    assert layer(x[:, :0]).shape == (2, 0, 64)
    assert relative(layer(x.float()), expected) < 1e-3  # 32 bits are torch's
    assert relative(layer(x), expected) < 1e-3


def test_there_and_back() -> None:
    layer = CompressedLinear([quantized(GRIDS["int3-integer"], PATTERNS["full"], 50, 300), residual(50, 300)]).to(GPU)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(2, 300, device=GPU, dtype=torch.bfloat16))
    assert layer.device == GPU and not in_torch(torch.nn.ModuleDict({"a": layer}))
    after = layer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    layer(torch.randn(2, 300, device=GPU, dtype=torch.bfloat16))
    assert layer.to("cpu").device.type == "cpu"


def test_the_same_bits_every_time_and_in_a_graph() -> None:
    layer = CompressedLinear([quantized(GRIDS["int4-none"], PATTERNS["full"], 512, 4096), residual(512, 4096)]).to(GPU)
    for tokens in (1, 16):
        x = torch.randn(tokens, 4096, device=GPU, dtype=torch.bfloat16)
        first = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(20):
            graph.replay()
            assert torch.equal(y, first) and torch.equal(layer(x), first)


def test_gradients_and_compilation() -> None:
    layer = CompressedLinear([quantized(GRIDS["int4-none"], PATTERNS["full"], 48, 256)]).to(GPU)
    x = torch.randn(4, 256, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).float().sum(), x)
    assert relative(gradient, layer.decode().double().sum(0).expand(4, -1)) < 1e-2
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer)(x), expected, rtol=1e-2, atol=1e-2)


def test_ops_keep_torchs_rules() -> None:
    term = quantized(GRIDS["int4-none"], PATTERNS["full"], 48, 256).to(GPU)
    made = term.prepare_()
    assert isinstance(term, Quantized) and made is not None
    x = torch.randn(4, 256, device=GPU, dtype=torch.float16, requires_grad=True)
    from rarefy.kernels.prepared import flat

    torch.library.opcheck(torch.ops.rarefy.linear_prepared.default, (x, *flat([made]), False))
    torch.library.opcheck(torch.ops.rarefy.decode_prepared.default, flat([made]))
    assert native.takes(x) and isinstance(residual(4, 8), Residual)


def test_more_than_two_billion_elements() -> None:
    layer = CompressedLinear([quantized(GRIDS["int4-none"], PATTERNS["full"], 4096, 256)]).to(GPU)
    weight = layer.decode().half()
    x = torch.randn(1 << 23, 256, device=GPU, dtype=torch.float16)  # 2^31 numbers; its product has 2^35
    y = layer(x[-40:])
    assert relative(y, x[-40:].double() @ weight.double().T) < 2e-3
