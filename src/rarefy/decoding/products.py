"""Products of several weights with the same input as one, without another copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.formats.terms.base import Term
from rarefy.kernels import native
from rarefy.kernels.adjacent import together
from rarefy.kernels.cuda.join import join_
from rarefy.kernels.cuda.prepared import Prepared
from rarefy.layers.linear import CompressedLinear

Product: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]


class Together:
    """``linears`` of the same input, as one product where their weights can be made to lie together, which moves them.

    ``terms``: what native kernels multiply by, of all of them; None where Torch computes, or adds a bias.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        self._linears = linears
        self._rows = [linear.out_features for linear in linears]
        terms = self._terms_()
        self._product = self._product_of_all_(terms) if len(linears) > 1 else None
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self._bias = _adjacent_(biases) if biases and self._product is not None else None
        self.terms = None if biases else terms

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[M, out_features]`` of each for ``x [M, in_features]``."""
        if self._product is None:
            return tuple(linear(x) for linear in self._linears)
        return self._product(x, self._bias).split(self._rows, -1)

    def _terms_(self) -> list[Prepared] | None:
        coded = [each for each in self._linears if type(each) is CompressedLinear]
        return _joined_(coded) if len(coded) == len(self._linears) and self._are_alike else None

    @property
    def _are_alike(self) -> bool:
        return len({(type(each), each.bias is None, each.weight.dtype) for each in self._linears}) == 1

    def _product_of_all_(self, terms: list[Prepared] | None) -> Product | None:
        if terms is not None:
            return lambda x, bias: native.linear(x, terms) if bias is None else native.linear(x, terms) + bias
        if type(self._linears[0]) is not nn.Linear or not self._are_alike:
            return None
        weight = _adjacent_([each.weight for each in self._linears])
        return lambda x, bias: F.linear(x, weight, bias)


def _joined_(layers: Sequence[CompressedLinear]) -> list[Prepared] | None:
    """Terms of the weights of all ``layers``; None where they are not of one kind, or computed by other kernels."""
    if not native.takes(torch.empty(0, dtype=layers[0].dtype, device=layers[0].device)):
        return None
    found = []
    for terms in zip_longest(*([*layer.terms] for layer in layers)):
        made = [term.prepare_() for term in terms if isinstance(term, Term) and not term.transforms_input]
        parts = [each for each in made if isinstance(each, Prepared)]
        whole = join_(parts) if len(parts) == len(layers) else None
        if whole is None:
            return None
        found.append(whole)
    return found


def _adjacent_(tensors: Sequence[Tensor]) -> Tensor:
    """``tensors`` as one, along their first dimension; they become views of it."""
    whole, places = together([each.data for each in tensors])
    for each, place in zip(tensors, places, strict=True):
        each.data = place
    return whole
