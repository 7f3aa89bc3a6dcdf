"""The loop that trains: its schedule, and that an interruption leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rarefy.core.errors import OptionError
from rarefy.training.loop import STATE, Schedule, train_
from rarefy.training.losses import row_divergence


def problem() -> tuple[dict[str, nn.Parameter], dict[int, int]]:
    """Two parameters, and how often each step was run."""
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(4, 3, generator=generator)) for name in ("a", "b")}, {}


def run(steps: int, work: Path | None, die_at: int | None = None, **changes: object) -> dict[str, torch.Tensor]:
    parameters, _ = problem()

    def step(number: int) -> float:
        if number == die_at:
            raise KeyboardInterrupt
        target = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
        loss = (parameters["a"] @ parameters["b"].mT - target @ target.mT).square().mean()
        loss.backward()
        return float(loss.detach())

    schedule = Schedule(steps=steps, rate=0.05, warmup=3)
    losses = train_(parameters, step, schedule, work=work, identity={"data": 1, **changes}, keep_every=0.0)
    assert len(losses) == steps
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = run(12, None)
    for at in (7, 11):
        with pytest.raises(KeyboardInterrupt):
            run(12, tmp_path / "work", die_at=at)
    resumed = run(12, tmp_path / "work")
    again = run(12, tmp_path / "work", die_at=0)  # nothing is left to do
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]) and torch.equal(tensor, again[name])


def test_the_state_of_another_run_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    run(3, tmp_path)
    with pytest.raises(OptionError, match="another data"):
        run(3, tmp_path, data=2)
    with pytest.raises(OptionError, match="another schedule"):
        run(4, tmp_path)
    (tmp_path / STATE).write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(OptionError, match="is damaged"):
        run(3, tmp_path)


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    parameters, _ = problem()
    with pytest.raises(OptionError, match="loss of step 0 is nan"):
        train_(parameters, lambda number: float("nan"), Schedule(steps=2))


def test_the_rate_rises_and_falls() -> None:
    schedule = Schedule(steps=100, rate=1.0, final_rate=0.1, warmup=10)
    rates = [schedule.rate_of(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 and max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.1 <= rates[-1] < 0.11


def test_row_divergence_is_that_of_allowed_choices() -> None:
    scores, target = torch.randn(2, 3, 5, 7, requires_grad=True), torch.rand(2, 3, 5, 7)
    allowed = torch.ones(5, 7, dtype=torch.bool).tril()
    target[0, 0, 1] = 0.0  # a row without a truth teaches nothing
    found = row_divergence(scores, target, allowed)
    total, rows = 0.0, 0
    for batch, head, row in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        wanted = target[batch, head, row, : row + 1]
        if float(wanted.sum()) == 0:
            continue
        wanted = wanted / wanted.sum()
        own = scores[batch, head, row, : row + 1].log_softmax(0)
        total, rows = total + float((wanted * (wanted.log() - own)).sum()), rows + 1
    assert float(found) == pytest.approx(total / rows, rel=1e-5)
    found.backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())
    assert float(row_divergence(scores.detach(), torch.zeros_like(target), allowed)) == 0.0
