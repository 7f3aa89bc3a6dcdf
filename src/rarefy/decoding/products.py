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


def together_(linears: Sequence[nn.Linear]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What computes ``linears`` of the same input, as one product where their weights can be made to lie together."""
    product = _product_of_all_(linears) if len(linears) > 1 else None
    if product is None:
        return lambda x: tuple(linear(x) for linear in linears)
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = _adjacent_(biases) if biases else None
    rows = [linear.out_features for linear in linears]
    return lambda x: product(x, bias).split(rows, -1)


def _product_of_all_(linears: Sequence[nn.Linear]) -> Product | None:
    kinds = {type(each) for each in linears}
    if kinds not in ({nn.Linear}, {CompressedLinear}):
        return None
    if len({(each.bias is None, each.weight.dtype) for each in linears}) > 1:
        return None
    if kinds == {nn.Linear}:
        weight = _adjacent_([each.weight for each in linears])
        return lambda x, bias: F.linear(x, weight, bias)
    terms = _joined_([each for each in linears if isinstance(each, CompressedLinear)])
    if terms is None:
        return None
    return lambda x, bias: native.linear(x, terms) if bias is None else native.linear(x, terms) + bias


def prepared_of(linears: Sequence[nn.Linear]) -> list[Prepared] | None:
    """Terms of the weights of all ``linears`` as they lie together; None where they are no codes or do not."""
    layers = [each for each in linears if isinstance(each, CompressedLinear)]
    return _joined_(layers) if len(layers) == len(linears) else None


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
