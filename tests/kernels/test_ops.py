"""Ops: schema, shapes while tracing, gradients and the reference agree, compiled or not, for every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rarefy.core.errors import FormatError
from rarefy.formats.terms import Quantized, Residual, Sparse, Term
from rarefy.formats.terms.base import op_arguments
from rarefy.kernels import ops
from tests.formats.samples import GRIDS, PATTERNS, TERMS, quantized

FAMILIES = sorted(ops.FAMILIES)
# Terms that are one op each, by the op's family; each family meets several patterns and layouts.
SINGLE = [name for name in TERMS if isinstance(TERMS[name](), Quantized | Sparse | Residual)]


def arguments(term: Term) -> tuple[str, tuple[Any, ...]]:
    """The family of a term's op, and all its arguments but ``x``."""
    if isinstance(term, Residual):
        return "csr", op_arguments(term, ("entries", "row_ptr"), term._plain)
    assert isinstance(term, Quantized | Sparse)
    return getattr(term, "family", "values"), op_arguments(term, term._names, term._plain)


def op(verb: str, family: str) -> Callable[..., Tensor]:
    return getattr(torch.ops.rarefy, f"{verb}_{family}").default  # type: ignore[no-any-return]


def test_every_family_is_sampled() -> None:
    assert sorted({arguments(TERMS[name]())[0] for name in SINGLE}) == FAMILIES
    assert sorted(ops.kernels()) == sorted(f"{verb}_{family}" for verb in ("decode", "linear") for family in FAMILIES)
    assert all("any" in served for served in ops.kernels().values())


@pytest.mark.parametrize("name", SINGLE)
def test_ops_keep_their_contract_with_torch(name: str) -> None:
    """Schema (nothing mutated, nothing aliased), registration of autograd, and shapes under fake tensors."""
    family, stored = arguments(TERMS[name]())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op("decode", family), stored, test_utils=checks)
    torch.library.opcheck(op("linear", family), (torch.randn(3, 40, requires_grad=True), *stored), test_utils=checks)


@pytest.mark.parametrize("name", ["integer", "groups csr", "fp4", "lut", "sparse", "residual"])
def test_ops_trace_with_dynamic_shapes(name: str) -> None:
    term = quantized(GRIDS["fp4"], PATTERNS["bitmap"], 6, 40) if name == "fp4" else TERMS[name]()
    family, stored = arguments(term)
    checks = ("test_aot_dispatch_dynamic",)
    for x in (torch.randn(3, 40, requires_grad=True), torch.randn(2, 3, 40)):
        torch.library.opcheck(op("linear", family), (x, *stored), test_utils=checks)
    torch.library.opcheck(op("decode", family), stored, test_utils=checks)


@pytest.mark.parametrize("name", SINGLE)
def test_fake_results_look_like_real_ones(name: str) -> None:
    family, stored = arguments(TERMS[name]())
    mode = FakeTensorMode()
    fakes = tuple(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in stored)
    for shape in ((40,), (0, 40), (3, 40), (2, 3, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype)
            real, fake = op("linear", family)(x, *stored), op("linear", family)(mode.from_tensor(x), *fakes)
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    real, fake = op("decode", family)(*stored), op("decode", family)(*fakes)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("name", SINGLE)
def test_linear_is_the_product_with_decode(name: str) -> None:
    family, stored = arguments(TERMS[name]())
    dense = op("decode", family)(*stored)
    assert dense.dtype == torch.float32 and dense.shape == (6, 40) and dense.is_contiguous()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        turned, spread = torch.randn(40, 5).to(dtype).t(), torch.randn(2, 80).to(dtype)[:, ::2]
        assert not turned.is_contiguous() and not spread.is_contiguous()
        for x in (turned, spread, *(torch.randn(shape).to(dtype) for shape in ((5, 40), (40,), (0, 40), (2, 3, 40)))):
            y = op("linear", family)(x, *stored)
            assert torch.equal(y, torch.nn.functional.linear(x, dense.to(dtype)))


@pytest.mark.parametrize("name", list(TERMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_reaches_the_input_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    term = TERMS[name]()
    dense = term.decode().to(dtype)
    for shape in ((40,), (3, 40), (2, 3, 40), (0, 40)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        pull = torch.randn(*shape[:-1], 6, dtype=dtype)
        (expected,) = torch.autograd.grad((x @ dense.T * pull).sum(), x)
        (actual,) = torch.autograd.grad((term(x) * pull).sum(), x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not any(tensor.requires_grad for tensor in term.buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_can_be_differentiated(family: str) -> None:
    stored = next(found for name in SINGLE for kind, found in [arguments(TERMS[name]())] if kind == family)
    x = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: op("linear", family)(x, *stored), (x,), eps=1e-3, atol=1e-3)
    squared = lambda x: op("linear", family)(x, *stored) ** 2  # noqa: E731
    assert torch.autograd.gradgradcheck(squared, (x,), eps=1e-3, atol=1e-1, rtol=1e-2)


def test_backward_keeps_what_is_stored_and_no_dense_weight() -> None:
    family, stored = arguments(quantized(GRIDS["int4-float"], PATTERNS["full"], 64, 512))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        op("linear", family)(torch.randn(1, 512, requires_grad=True), *stored)
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) < 64 * 512


def test_no_gradient_where_none_is_asked_for() -> None:
    family, stored = arguments(TERMS["integer"]())
    assert not op("linear", family)(torch.randn(2, 40), *stored).requires_grad
    with torch.no_grad():
        assert not op("linear", family)(torch.randn(2, 40, requires_grad=True), *stored).requires_grad
    with torch.inference_mode():
        assert torch.isfinite(TERMS["integer"]()(torch.randn(2, 40))).all()


@pytest.mark.parametrize("columns", [39, 41])
def test_an_input_of_another_width_is_an_error_not_a_crash(columns: int) -> None:
    for name in SINGLE:
        family, stored = arguments(TERMS[name]())
        with pytest.raises(RuntimeError):
            op("linear", family)(torch.randn(2, columns), *stored)
    for make in TERMS.values():
        with pytest.raises(FormatError, match=f"has {columns} channels, but the weight has 40 columns"):
            make()(torch.randn(2, columns))


class Several(nn.Module):
    """What a compressed layer does: add up the products of its terms."""

    def __init__(self, *terms: Term):
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(self, x: Tensor) -> Tensor:
        y = self.terms[0](x)
        for term in self.terms[1:]:
            y = y + term(x)
        return y  # type: ignore[no-any-return]


def compiled(module: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager", **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "names",
    [
        ["integer", "residual", "product", "multiplier"],
        ["permuted", "scaled", "rotated"],
        ["lut", "n:m", "groups csr", "sparse", "ternary", "two scales", "bilevel"],
        ["rows", "rows ordered", "columns", "columns ordered", "shared", "dense"],
    ],
    ids=lambda names: "+".join(names),
)
def test_compiled_terms_equal_eager_ones(names: list[str]) -> None:
    layer = Several(*(TERMS[name]() for name in names))
    fast = compiled(layer)
    for x in (torch.randn(3, 40), torch.randn(3, 40).bfloat16(), torch.randn(3, 40, requires_grad=True)):
        assert torch.equal(fast(x), layer(x))
    x = torch.randn(3, 40, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (actual,) = torch.autograd.grad(fast(x).square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_a_compiled_layer_takes_any_batch_without_compiling_again() -> None:
    names = ("integer", "residual", "permuted", "scaled", "rotated", "columns ordered", "rows ordered", "product")
    layer = Several(*(TERMS[name]() for name in names))
    fast = compiled(layer, dynamic=True)
    fast(torch.randn(3, 5, 40))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 4), (7, 3), (5, 129)):
            x = torch.randn(batch, tokens, 40)
            torch.testing.assert_close(fast(x), layer(x))


def test_a_kernel_of_one_device_is_named() -> None:
    """Registered for a device that no test runs on."""

    def marked(entries: Tensor, row_ptr: Tensor, half: bool, rows: int, columns: int) -> Tensor:
        return ops.FAMILIES["csr"][1](entries, row_ptr, half, rows, columns)

    before = ops.kernels()
    ops.register_kernel("decode_csr", "XPU", marked, "marked")
    assert ops.kernels() == {**before, "decode_csr": {"any": "reference", "XPU": "marked"}}
    assert torch._C._dispatch_has_kernel_for_dispatch_key("rarefy::decode_csr", "XPU")
