"""The driver on a GPU: what it tells, what it brings back beside its work, and the same bytes twice."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import rarefy
from rarefy.calibration.solving import output_error
from rarefy.contracts import Layer
from rarefy.core.devices import copy_to_cpu
from rarefy.solvers.gptq import gptq
from rarefy.solvers.hessian import inverse_hessian
from rarefy.statistics import Statistics
from tests.gpu.test_columns import GPU, on_gpu
from tests.solvers.kinds import EVEN
from tests.zoo import VOCABULARY, dense_folder, same_bytes, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def test_output_errors_are_those_of_float64() -> None:
    """Error feedback leaves what the inputs hardly see: the small difference of large numbers."""
    weight, gram = on_gpu(96, 320)
    [term] = gptq([weight], inverse_hessian(gram, 0.01, sort=True), EVEN, static_groups=True)[0]
    difference = weight - term.decode()
    lost, whole = (((w.double() @ gram.sum.double()) * w).sum() for w in (difference, weight))
    found = output_error(Layer("layer", weight, Statistics(gram=gram)), difference)
    assert found == pytest.approx(float((lost / whole).sqrt()), rel=1e-4)


def test_copies_are_made_beside_other_work() -> None:
    data = {name: torch.randn(1 << 20, device=GPU) for name in "ab"}
    left, right = (torch.randn(8192, 8192, device=GPU) for _ in range(2))
    product, last = left @ right, torch.cuda.Event()
    copy_to_cpu(data)()  # what is done once, such as making streams, may wait
    torch.cuda.synchronize()
    copies, found = copy_to_cpu({**data, "here": torch.ones(3)}), dict[str, torch.Tensor]()
    for _ in range(60):  # a second
        torch.mm(left, right, out=product)
    last.record()
    thread = threading.Thread(target=lambda: found.update(copies()))
    thread.start()
    thread.join()
    assert not last.query()  # nor did they wait for what was asked after them
    assert all(torch.equal(found[name], own.cpu()) for name, own in data.items())
    assert torch.equal(found["here"], torch.ones(3))


@pytest.mark.parametrize("recipe", ["gptq", "awq", "spqr", "sparsegpt"])
def test_twice_is_the_same_and_much_as_on_a_processor(recipe: str, tmp_path: Path) -> None:
    dense_folder("llama", tmp_path / "dense")
    data = torch.randint(3, VOCABULARY, (16, 30), generator=torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"group_size": 16} if recipe in ("gptq", "awq") else {}
    reports = {
        out: rarefy.compress(tmp_path / "dense", recipe, options=options, data=data, out=tmp_path / out, device=device)
        for out, device in (("one", "cuda"), ("two", "cuda"), ("three", "cpu"))
    }
    assert same_bytes(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    for mine, theirs in zip(reports["one"].layers, reports["three"].layers, strict=True):
        assert mine.output_error == pytest.approx(theirs.output_error, rel=0.1)
