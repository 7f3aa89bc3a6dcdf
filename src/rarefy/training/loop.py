"""The loop that trains: a schedule, an optimizer, and a state on disk from which a killed run goes on to the same
bytes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rarefy.core.config import StrictModel
from rarefy.core.errors import OptionError
from rarefy.core.files import lock_folder, read_header, write_tensors
from rarefy.core.progress import progress

STATE = "training.safetensors"
FORMAT = "rarefy-training-1"
# Between two savings of the state, in seconds: what a killed run loses at most.
KEEP_EVERY = 20.0
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Schedule(StrictModel):
    """``steps`` of AdamW without weight decay: the rate rises to ``rate`` over ``warmup`` steps and falls to
    ``final_rate`` along a cosine."""

    steps: int = Field(500, ge=1)
    rate: float = Field(1e-3, gt=0)
    final_rate: float = Field(0.0, ge=0)
    warmup: int = Field(20, ge=0)

    def rate_of(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_rate + (self.rate - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def train_(
    parameters: Mapping[str, nn.Parameter],
    step: Callable[[int], float],
    schedule: Schedule,
    *,
    work: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    label: str = "train",
    keep_every: float | None = None,
) -> list[float]:
    """Train ``parameters`` in place; the losses of all steps.

    ``step(number)`` leaves gradients in the parameters and returns the loss; it must depend on its number and the
    parameters only. ``work``: a folder that keeps parameters and moments every ``keep_every`` seconds (None:
    ``KEEP_EVERY``) and at the end; a run on it that has the same ``identity`` goes on there, and ends in the bytes of
    one that was never interrupted. Raises OptionError when the folder holds another run's state or is in use, and when
    a loss is not finite.
    """
    marks = json.loads(json.dumps({**(identity or {}), "schedule": schedule.model_dump(), "torch": torch.__version__}))
    pause = KEEP_EVERY if keep_every is None else keep_every
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=schedule.rate, weight_decay=0.0)
    with ExitStack() as held:
        if work is not None:
            held.callback(lock_folder(work).release)
        losses = [] if work is None else _restore_(work / STATE, parameters, optimizer, marks)
        last = time.monotonic()
        with progress(label, schedule.steps) as advance:
            advance(len(losses))
            for number in range(len(losses), schedule.steps):
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate_of(number)
                optimizer.zero_grad(set_to_none=True)
                losses.append(step(number))
                if not math.isfinite(losses[-1]):
                    raise OptionError(f"The loss of step {number} is {losses[-1]}; use a smaller learning rate.")
                optimizer.step()
                advance(1, f"loss {losses[-1]:.4f}")
                if work is not None and (time.monotonic() - last >= pause or number + 1 == schedule.steps):
                    _keep(work / STATE, parameters, optimizer, losses, marks)
                    last = time.monotonic()
    return losses


def _keep(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, losses: list[float], marks: Mapping[str, Any]
) -> None:
    tensors: dict[str, Tensor] = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, parameter in parameters.items():
        tensors[f"value.{name}"] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, tensors, {"rarefy": json.dumps({"format": FORMAT, "marks": marks}, sort_keys=True)})


def _restore_(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, marks: Mapping[str, Any]
) -> list[float]:
    """Put a kept state back; the losses so far, none where there is no state."""
    from safetensors.torch import load_file

    if not path.exists():
        return []
    try:
        about = json.loads(read_header(path).metadata["rarefy"])
        if about["format"] != FORMAT:
            raise ValueError
        known = dict(about["marks"])
    except (KeyError, TypeError, ValueError):
        raise OptionError(f"'{path.name}' in --work-dir '{path.parent}' is damaged; delete the folder.") from None
    changed = [name for name in {**marks, **known} if known.get(name) != marks.get(name)]
    if changed:
        raise OptionError(
            f"--work-dir '{path.parent}' holds a training with another {changed[0]}; name another folder, or delete "
            "this one."
        )
    tensors = load_file(path)
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"value.{name}"])
        state = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
        optimizer.state[parameter] = {
            moment: tensor if moment == "step" else tensor.to(parameter.device) for moment, tensor in state.items()
        }
    return [float(loss) for loss in tensors["losses"]]
