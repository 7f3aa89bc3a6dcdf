"""Layouts moved to one piece of memory are the same layouts."""

from __future__ import annotations

import pytest
import torch

from rarefy.kernels import cpu
from rarefy.kernels.cpu.memory import HUGE, LINE, gather_
from tests.decoding.models import build_model, compress

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native library was not built")


def test_values_stay_and_lie_together() -> None:
    model = compress(build_model("llama"), scales="bilevel", group_size=48)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = [module for module in model.modules() if hasattr(module, "prepare_") and hasattr(module, "terms")]
    terms = [made for layer in layers for term in layer.terms if (made := term.prepare_()) is not None]
    assert len(terms) == 2 * 7
    before = [{name: tensor.clone() for name, tensor in made.tensors.items()} for made in terms]
    gather_(terms)
    after = [tensor for made in terms for tensor in made.tensors.values()]
    assert all(
        torch.equal(made.tensors[name], tensor) and made.tensors[name].dtype == tensor.dtype
        for made, saved in zip(terms, before, strict=True)
        for name, tensor in saved.items()
    )
    assert len({tensor.untyped_storage().data_ptr() for tensor in after}) == 1
    assert all(tensor.data_ptr() % LINE == 0 for tensor in after) and after[0].data_ptr() % HUGE == 0
    places = [tensor.data_ptr() for tensor in after]
    gather_(terms)  # nothing to do
    assert [tensor.data_ptr() for made in terms for tensor in made.tensors.values()] == places
    again = model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


def test_nothing_to_gather() -> None:
    gather_([])
