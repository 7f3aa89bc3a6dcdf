"""Products that do what follows them, run by this processor: the same as operations of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from rarefy.decoding.interpreter import ACTIVATIONS
from rarefy.formats.grids import BinaryGrid
from rarefy.formats.terms import Term
from rarefy.kernels.cuda import tuning
from rarefy.kernels.cuda.linear import Beside, product_with_ending
from rarefy.kernels.cuda.prepared import prepare
from rarefy.kernels.cuda.program import Ending, Tuning
from tests.formats.samples import GRIDS, PATTERNS, quantized, residual
from tests.kernels.cuda import emulation

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="there is no C++ compiler")

EPS = 1e-5
SPREAD, DIRECT = Tuning(1, 1, 2, 2, 2, spread=True), Tuning(2, 1, 2, 1, 1)
CUTS = [
    (SPREAD, 1), (DIRECT, 3), (Tuning(1, 2, 2, 2, 1, 2), 11), (Tuning(1, 1, 2, 1, 2, 0, 2, spread=True), 1),
    (Tuning(1, 1, 4, 1, 1, 0, 2), 5), (Tuning(1, 1, 2, 2, 1, spread=True, stored=True), 1),
    (Tuning(1, 1, 2, 2, 1, held=2), 2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.kernels.cuda.program.linear", emulation.program_linear)


def product(
    terms: list[Term], x: Tensor, ending: Ending, beside: Beside, cut: Tuning, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    monkeypatch.setattr(tuning, "choose_with", lambda *given: cut)
    return product_with_ending(x, [prepare(*term.operation()) for term in terms], ending, beside)  # type: ignore[misc]


def dense(terms: list[Term]) -> Tensor:
    return sum(term.decode().double() for term in terms)  # type: ignore[return-value]


def row_squares(x: Tensor, parts: int) -> Tensor:
    """Sums of squares of pieces of each row, of unequal lengths."""
    return torch.stack([part.float().square().sum(1) for part in x.tensor_split(parts, 1)], 1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("cut", "tokens"), CUTS, ids=str)
@pytest.mark.parametrize("outliers", [False, True])
def test_rows_are_divided_after_the_product(
    cut: Tuning, tokens: int, outliers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = [quantized(GRIDS["int4-integer"], PATTERNS["full"], 64, 320), *[residual(64, 320)] * outliers]
    x = (torch.randn(tokens, 320) * 7).bfloat16()
    beside = Beside(row_squares(x, 37), EPS)
    y, _ = product(terms, x, Ending(normed=True), beside, cut, monkeypatch)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + EPS).sqrt()
    assert relative(y, exact @ dense(terms).T) < 4e-3


@pytest.mark.parametrize(
    ("cut", "tokens", "activation"),
    [*((*each, "silu") for each in CUTS), *((*CUTS[0], each) for each in ("gelu", "gelu_tanh", "relu"))],
    ids=str,
)
def test_half_of_the_rows_is_gated(
    cut: Tuning, tokens: int, activation: Literal["silu", "gelu", "gelu_tanh", "relu"], monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = [quantized(GRIDS["int3-float"], PATTERNS["full"], 160, 300), residual(160, 300)]
    x = torch.randn(tokens, 300).bfloat16()
    y, _ = product(terms, x, Ending(kind="gated", activation=activation), Beside(), cut, monkeypatch)
    gate, up = (x.double() @ dense(terms).T).chunk(2, 1)
    assert y.shape == (tokens, 80)
    assert relative(y, ACTIVATIONS[activation](gate) * up) < 1e-2


@pytest.mark.parametrize("stored", [False, True])
def test_bit_planes_with_an_ending(stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terms: list[Term] = [quantized(BinaryGrid(group_size=128), PATTERNS["full"], 160, 640)]
    x, cut = torch.randn(1, 640).bfloat16(), replace(SPREAD, stored=stored)
    y, _ = product(terms, x, Ending(True, "gated"), Beside(row_squares(x, 5), EPS), cut, monkeypatch)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + EPS).sqrt()
    gate, up = (exact @ dense(terms).T).chunk(2, 1)
    assert relative(y, ACTIVATIONS["silu"](gate) * up) < 1e-2


@pytest.mark.parametrize(("cut", "tokens"), CUTS, ids=str)
@pytest.mark.parametrize("centred", [False, True])
def test_it_is_added_to_the_residual_stream(
    cut: Tuning, tokens: int, centred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = [quantized(GRIDS["int4-integer"], PATTERNS["full"], 96, 300)]
    x, hidden, gain = torch.randn(tokens, 300).bfloat16(), torch.randn(tokens, 96).bfloat16(), torch.rand(96).bfloat16()
    exact = hidden.double() + x.double() @ dense(terms).T
    beside = Beside(hidden=hidden, gain=gain)
    y, squared = product(terms, x, Ending(kind="added", centred=centred), beside, cut, monkeypatch)
    assert relative(hidden, exact) < 4e-3  # in place
    assert relative(y, exact * (gain.double() + centred)) < 8e-3
    torch.testing.assert_close(squared, hidden.float().square().unflatten(1, (-1, 16)).sum(2))
