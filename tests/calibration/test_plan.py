"""Where hidden states go: to the GPU that computes, when it has room for them."""

from __future__ import annotations

import pytest
import torch

from rarefy.calibration.plan import Plan, fits_device


@pytest.mark.parametrize("free,fits", [(1000, True), (800, True), (799, False)])
def test_hidden_states_stay_on_a_gpu_with_room(free: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
    wanted = Plan(activations=100, states=50, block=50, statistics=100, solver=100, results=10)
    assert fits_device(wanted, torch.device("cuda")) is fits
    assert not fits_device(wanted, torch.device("cpu"))


def test_the_plan_says_where_hidden_states_are() -> None:
    wanted = Plan(activations=100, states=50, block=50, statistics=100, solver=100, results=10)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert "activations 150 B on cuda" in wanted.describe(gpu, gpu, False)
    assert "activations 150 B in memory" in wanted.describe(gpu, cpu, False)
    assert "activations 250 B on disk" in wanted.describe(gpu, cpu, True)
