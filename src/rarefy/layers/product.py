"""The product of an input with a sum of terms, natively where kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.formats.terms import Term
from rarefy.kernels import native


def multiply(terms: Sequence[Term], x: Tensor) -> Tensor:
    """``x @ weight.T`` for the sum of ``terms``; those in native layouts that read ``x`` itself are one pass."""
    products = []
    together = [term for term in terms if not term.transforms_input and term.prepared_for(x) is not None]
    if len(together) > 1:
        made = [prepared for term in together if (prepared := term.prepared_for(x)) is not None]
        products.append(native.linear(x, made, together[0].fast))
        terms = [term for term in terms if term not in together]
    products += [term(x) for term in terms]
    y = products[0]
    for product in products[1:]:
        y = y + product
    return y


def takes_native(x: Tensor) -> bool:
    """Whether native kernels could read ``x``: an ordinary tensor that nobody traces."""
    return type(x) is Tensor and not _traced() and native.takes(x)


def _traced() -> bool:
    """Whether somebody records what is computed instead of computing it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
