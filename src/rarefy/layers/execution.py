"""How the compressed layers of a model compute: with exact or quantized activations, natively or in torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from torch import nn

from rarefy.formats.terms import Term
from rarefy.layers.swap import compressed

Executor = Literal["exact", "fast"]


def set_executor_(model: nn.Module, executor: Executor) -> None:
    """``exact`` keeps activations in 16 or 32 bits; ``fast`` lets native kernels quantize them to 8 bits."""
    for term in _terms(model):
        term.fast = executor == "fast"


def executor_of(model: nn.Module) -> Executor:
    """What ``set_executor_`` was last told."""
    return "fast" if any(term.fast for term in _terms(model)) else "exact"


def executed(model: nn.Module) -> Executor:
    """How the last products were really computed: ``fast`` only if a native kernel quantized activations."""
    return "fast" if any(term.fast and term.quantizes_activations for term in _terms(model)) else "exact"


@contextlib.contextmanager
def executing(model: nn.Module, executor: Executor) -> Iterator[None]:
    """Use ``executor`` within the context."""
    before = executor_of(model)
    set_executor_(model, executor)
    try:
        yield
    finally:
        set_executor_(model, before)


def prepare_(model: nn.Module) -> None:
    """Put all compressed layers into the layouts of native kernels, instead of each at its first use."""
    for _, module in compressed(model):
        module.prepare_()


def restore_(model: nn.Module) -> None:
    """Undo ``prepare_``: buffers hold stored tensors again, where layouts had left shapes on the meta device."""
    for term in _terms(model):
        term.restore_()


def in_torch(model: nn.Module) -> dict[str, str]:
    """Names of terms that were prepared for native kernels and are read by none, each with the reason."""
    found: dict[str, str] = {}
    for name, module in compressed(model):
        for label, part in module.terms.named_modules():
            if isinstance(part, Term) and part.refused is not None:
                found[f"{name}.terms.{label}"] = part.refused
    return found


def _terms(model: nn.Module) -> Iterator[Term]:
    for _, module in compressed(model):
        for part in module.terms.modules():
            if isinstance(part, Term):
                yield part
