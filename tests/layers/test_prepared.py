"""Execution layouts in layers: there and back bit for bit, no second copy, and nobody meets a placeholder."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rarefy.formats.terms import Partition, Product, Quantized, Residual, Term, stack
from rarefy.kernels import cpu
from rarefy.kernels.cpu.prepared import NotCovered
from rarefy.layers.execution import executed, executing, in_torch, prepare_
from rarefy.layers.experts import CompressedStack
from rarefy.layers.linear import CompressedLinear
from rarefy.layers.swap import exact_bytes
from tests.formats.samples import GRIDS, PATTERNS, TERMS, quantized
from tests.formats.samples import residual as outliers

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native library was not built")

SINGLE = ["integer", "planes", "multiplier", "bilevel", "ternary", "lut", "groups", "sparse", "residual"]


def bytes_of(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else repr(tensor).encode()
            for name, tensor in module.state_dict().items()}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TERMS))
def test_saving_after_use_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    layer = CompressedLinear([TERMS[name]()])
    before, x = bytes_of(layer), torch.randn(3, 40)
    expected = torch.nn.functional.linear(x, layer.decode())
    for _ in range(2):  # use, save, use again
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.decode(), layer.weight.dense())
        save_file(layer.state_dict(), tmp_path / "layer.safetensors")
        assert bytes_of(layer) == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    grid=st.sampled_from(sorted(GRIDS)), pattern=st.sampled_from(sorted(PATTERNS)), rows=st.integers(1, 40),
    columns=st.integers(1, 200), seed=st.integers(0, 3),
)  # fmt: skip
def test_any_layout_can_be_undone(grid: str, pattern: str, rows: int, columns: int, seed: int) -> None:
    own = GRIDS[grid]
    group = PATTERNS[pattern].group
    if group is not None and (own.group_size != group or own.family == "lut"):
        return
    term = quantized(own, PATTERNS[pattern], rows, columns, seed)
    before, dense = bytes_of(term), term.decode()
    term.prepare_()
    assert term.is_prepared or term.refused
    if term.is_prepared:
        assert torch.equal(term.decode(), dense)
        assert all(tensor.is_meta for tensor in term._buffers.values() if tensor is not None)
    assert bytes_of(term) == before and not term.is_prepared


def test_there_is_one_copy() -> None:
    layer = CompressedLinear([quantized(GRIDS["int4-integer"], PATTERNS["full"], 512, 1024)])
    stored = layer.byte_count().total
    layer(torch.randn(1, 1024))
    assert layer.byte_count().total == stored
    gc.collect()
    inside = [tensor for term in layer.terms for tensor in term._prepared.tensors.values()]  # type: ignore[union-attr]
    held = sum(tensor.numel() * tensor.element_size() for tensor in inside)
    assert held < 1.1 * stored and not [tensor for tensor in layer.buffers() if not tensor.is_meta]


def test_copies_casts_and_loading() -> None:
    layer = CompressedLinear([TERMS["integer"](), outliers(6, 40)])
    x = torch.randn(2, 40)
    y, state = layer(x), copy.deepcopy(layer.state_dict())
    layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y) and torch.equal(layer(x), y)
    assert layer.half()(x.half()).dtype == torch.float16 and layer.dtype == torch.float16
    assert torch.equal(layer.float()(x), y)
    other = CompressedLinear([quantized(GRIDS["int4-integer"], PATTERNS["full"], 6, 40, 1), outliers(6, 40, 1)])
    assert not torch.equal(other(x), y)
    sizes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    if all(sizes[name] == tensor.shape for name, tensor in state.items()):
        other.load_state_dict(state)
        assert torch.equal(other(x), y)
    assert layer.device.type == "cpu" and layer.to("meta").device.type == "meta"


def test_double_precision_and_gradients() -> None:
    layer = CompressedLinear([TERMS["integer"](), outliers(6, 40)])
    dense = layer.decode()
    x = torch.randn(2, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, dense.sum(0).expand(2, -1), rtol=1e-5, atol=1e-5)
    wide = torch.randn(2, 40, dtype=torch.float64)
    torch.testing.assert_close(layer(wide), wide @ dense.double().T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(x), x @ dense.T, rtol=1e-5, atol=1e-5)


def test_products_prepare_their_factors() -> None:
    left, right = (quantized(GRIDS["int4-integer"], PATTERNS["full"], *shape) for shape in ((6, 32), (32, 40)))
    layer = CompressedLinear([Product(left, right)])
    x = torch.randn(2, 40)
    torch.testing.assert_close(layer(x), x @ layer.decode().T, rtol=1e-4, atol=1e-4)
    layer(x)
    assert left.is_prepared and right.is_prepared


def test_what_runs_in_torch_is_named() -> None:
    model = torch.nn.ModuleDict({"a": CompressedLinear([quantized(GRIDS["binary3"], PATTERNS["full"], 6, 40)])})
    assert in_torch(model) == {}
    prepare_(model)
    (where, reason), = in_torch(model).items()
    assert where == "a.terms.0" and "groups of 16" in reason


def test_fast_execution_is_told_apart() -> None:
    layer = CompressedLinear([quantized(GRIDS["int4-integer"], PATTERNS["full"], 20, 64)])
    model, x = torch.nn.ModuleDict({"a": layer}), torch.randn(3, 64)
    exact = layer(x)
    assert executed(model) == "exact"
    with executing(model, "fast"):
        fast = layer(x)
        assert executed(model) == "fast"
    assert torch.equal(layer(x), exact) and not torch.equal(fast, exact)
    assert float((fast - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("name", ["int4-integer", "int3-bilevel-float", "level3-none", "lut4-tensor"])
def test_experts_compute_natively_each_in_its_own_layout(name: str) -> None:
    members = [quantized(GRIDS[name], PATTERNS["full"], 6, 40, seed) for seed in range(3)]
    corrections = [outliers(6, 40, seed) for seed in range(3)]
    experts = CompressedStack([stack(members), stack(corrections)])  # type: ignore[arg-type]
    before, dense = bytes_of(experts), experts.decode()
    model, x = torch.nn.ModuleDict({"experts": experts}), torch.randn(2, 40)
    for mode in ("exact", "fast", "exact"):
        with executing(model, mode):  # type: ignore[arg-type]
            tolerance = 1e-4 if mode == "exact" else 0.1
            for index in (1, 0, 2):
                y = torch.nn.functional.linear(x, experts[index])
                torch.testing.assert_close(y, x @ dense[index].T, rtol=tolerance, atol=tolerance * 10)
        assert all(term.is_prepared for term in experts.terms) and in_torch(model) == {}  # type: ignore[union-attr]
        assert experts.device.type == "cpu"
        held = [tensor for term in experts.terms for tensor in term._buffers.values() if not tensor.is_meta]  # type: ignore[union-attr, operator]
        assert not held
        torch.testing.assert_close(experts[2].dense(), dense[2])
    assert experts.byte_count().total == CompressedStack([stack(members), stack(corrections)]).byte_count().total  # type: ignore[arg-type]
    assert bytes_of(experts) == before and torch.equal(experts.decode(), dense)


def test_experts_that_no_kernel_reads_say_so() -> None:
    members = [quantized(GRIDS["binary3"], PATTERNS["full"], 6, 40, seed) for seed in range(2)]
    experts = CompressedStack([stack(members)])  # type: ignore[arg-type]
    model, x = torch.nn.ModuleDict({"experts": experts}), torch.randn(2, 40)
    torch.testing.assert_close(torch.nn.functional.linear(x, experts[1]), x @ experts.decode()[1].T)
    assert list(in_torch(model)) == ["experts.terms.0"]


def test_experts_of_different_widths_compute_natively() -> None:
    parts = [stack([quantized(GRIDS[name], PATTERNS["full"], 6, 40, seed) for seed in range(2)]) for name in
             ("int4-integer", "int2-none")]  # fmt: skip
    experts = CompressedStack([Partition.of("experts", parts, torch.tensor([3, 0, 2, 1]))])  # type: ignore[arg-type]
    before, dense, x = bytes_of(experts), experts.decode(), torch.randn(2, 40)
    for index in range(4):
        y = torch.nn.functional.linear(x, experts[index])
        torch.testing.assert_close(y, x @ dense[index].T, rtol=1e-4, atol=1e-4)
    assert all(part.is_prepared for part in parts)
    assert bytes_of(experts) == before


def test_sizes_of_a_model_in_use() -> None:
    model = torch.nn.ModuleDict({"a": CompressedLinear([TERMS["integer"]()], torch.zeros(6))})
    before = exact_bytes(model)
    model["a"](torch.randn(1, 40))
    assert exact_bytes(model) == before


def test_a_compiled_layer_agrees() -> None:
    layer, x = CompressedLinear([TERMS["integer"](), outliers(6, 40)]), torch.randn(2, 40)
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


def test_no_term_is_left_out() -> None:
    assert {type(TERMS[name]()) for name in SINGLE} >= {Quantized, Residual}
    for name in SINGLE:
        term: Term = TERMS[name]()
        assert term.operation() is not None
        try:
            cpu.prepare(*term.operation())  # type: ignore[misc]
        except NotCovered as reason:
            raise AssertionError(f"{name}: {reason}") from None
