"""What a calibrated job will need, in memory and on disk, said before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rarefy.calibration.gradients import states_at_once
from rarefy.calibration.samples import Samples
from rarefy.core.errors import OptionError
from rarefy.core.memory import available_bytes, free_disk_bytes, human
from rarefy.layers.swap import Site

# Copies of the widest layer's inputs' second moments that a solver holds: the sum, its factor and a working copy.
SOLVER_COPIES = 3
# Float32 copies of a weight that a solver holds: the weight, its running errors, its codes, its decoded values.
WEIGHT_COPIES = 5
ROOM = 0.5  # of what is free on a GPU: the rest is for the block's own temporaries and for others
SPARE = 0.8  # of what is free: the rest is for the interpreter, the model library and the file cache


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose. ``activations`` lie on the device or the host, or on disk (there twice: a block's inputs and
    its outputs), ``states`` with them while gradients are taken, ``block``, ``statistics`` and ``solver`` on the
    device; ``results`` on disk."""

    activations: int
    states: int
    block: int
    statistics: int
    solver: int
    results: int

    @property
    def device(self) -> int:
        """Bytes on the device that computes."""
        return self.block + self.statistics + self.solver

    @property
    def memory(self) -> int:
        """Bytes of hidden states that are kept in memory."""
        return self.activations + self.states

    @property
    def mapped(self) -> int:
        """Bytes of hidden states that are kept on disk."""
        return 2 * self.activations + self.states

    def describe(self, device: torch.device, hidden: torch.device, mapped: bool) -> str:
        """One line for the person; ``hidden`` is in whose memory activations are that are not ``mapped``."""
        place = "on disk" if mapped else "in memory" if hidden.type == "cpu" else f"on {hidden.type}"
        activations = f"activations {human(self.mapped if mapped else self.memory)} {place}"
        return (
            f"plan: one block {human(self.block)}, statistics {human(self.statistics)}, solver {human(self.solver)} "
            f"on {device.type}; {activations}; solutions up to {human(self.results)} on disk"
        )


def plan(
    model: nn.Module,
    blocks: Sequence[str],
    sites: Sequence[Site],
    samples: Samples,
    dtype: torch.dtype,
    streams: int,
    gradients: bool,
) -> Plan:
    """Estimates from shapes alone; layers of one parent and width are taken to read one input, as q, k and v do.

    ``streams``: kinds of hidden states that are kept; ``gradients`` keeps those between some blocks besides.
    """
    states = samples.positions * _hidden_width(model, sites) * dtype.itemsize
    sizes = [_block_bytes(model.get_submodule(name), dtype) for name in blocks]
    by_block = [[site for site in sites if site.name.startswith(f"{name}.")] for name in blocks]
    statistics = max((_gram_bytes(own) for own in by_block), default=0)
    solver = max(
        (SOLVER_COPIES * 4 * s.members * s.shape[-1] ** 2 + WEIGHT_COPIES * 4 * s.count for s in sites), default=0
    )
    results = sum(site.count for site in sites)  # at most a byte a weight, as a rule half of that
    between = states_at_once(len(blocks)) * states * gradients
    return Plan(streams * states, between, max(sizes), statistics, solver, results)


def check_plan(wanted: Plan, device: torch.device, scratch: Path | None, processes: int) -> str | None:
    """What is likely to go wrong, as a note. ``processes`` like this one share the machine.

    Raises OptionError when the disk certainly is too small for what ``scratch`` will hold.
    """
    if scratch is not None:
        held = sum(path.stat().st_size for path in scratch.glob("*.bin"))  # what an interrupted job has taken
        if (missing := (wanted.mapped - held) * processes) > free_disk_bytes(scratch):
            raise OptionError(
                f"The job keeps {human(missing)} of activations on disk, but only {human(free_disk_bytes(scratch))} "
                f"are free at '{scratch}'; use fewer --samples or another --work-dir."
            )
    on_host = device.type == "cpu"
    free = available_bytes() if on_host else torch.cuda.mem_get_info(device)[0]
    needed = wanted.device + (wanted.memory if on_host and scratch is None else 0)
    needed *= processes if on_host else 1
    if free is not None and needed > free:
        return f"the job needs about {human(needed)} on {device.type}, and {human(free)} are free"
    return None


def fits_device(wanted: Plan, device: torch.device) -> bool:
    """Whether activations can stay on the GPU that computes, where reading and writing them takes next to no time."""
    return device.type == "cuda" and wanted.device + wanted.memory <= ROOM * torch.cuda.mem_get_info(device)[0]


def fits_memory(wanted: Plan, device: torch.device, processes: int) -> bool:
    """Whether activations of ``processes`` like this one can stay in host memory."""
    free = available_bytes()
    needed = wanted.memory + (wanted.device if device.type == "cpu" else 0)
    return free is None or needed * processes <= SPARE * free


def _hidden_width(model: nn.Module, sites: Sequence[Site]) -> int:
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config
    width = getattr(text, "hidden_size", None)
    return int(width) if width else min((site.shape[-1] for site in sites), default=1)


def _block_bytes(block: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in block.parameters()) * dtype.itemsize


def _gram_bytes(sites: Sequence[Site]) -> int:
    inputs = {(site.name.rpartition(".")[0], site.shape[-1]): site.members for site in sites}
    return sum(members * width**2 * 4 for (_, width), members in inputs.items())
