"""What a calibrated job will need, in memory and on disk, said before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rarefy.calibration.samples import Samples
from rarefy.core.errors import OptionError
from rarefy.core.memory import available_bytes, free_disk_bytes, human
from rarefy.layers.swap import Site

# Copies of the widest layer's inputs' second moments that a solver holds: the sum, its factor and a working copy.
SOLVER_COPIES = 3
# Float32 copies of a weight that a solver holds: the weight, its running errors, its codes, its decoded values.
WEIGHT_COPIES = 5
SPARE = 0.8  # of what is free: the rest is for the interpreter, the model library and the file cache


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose. ``activations`` lie on the host, ``block`` and ``solver`` on the device."""

    activations: int
    block: int
    statistics: int
    solver: int
    disk: int

    @property
    def device(self) -> int:
        """Bytes on the device that computes."""
        return self.block + self.statistics + self.solver

    def describe(self, device: torch.device, mapped: bool) -> str:
        """One line for the person."""
        where = "on disk" if mapped else "in memory"
        return (
            f"plan: one block {human(self.block)}, statistics {human(self.statistics)}, solver {human(self.solver)} "
            f"on {device.type}; activations {human(self.activations)} {where}; disk {human(self.disk)}"
        )


def plan(
    model: nn.Module,
    blocks: Sequence[str],
    sites: Sequence[Site],
    samples: Samples,
    dtype: torch.dtype,
    streams: int,
    mapped: bool,
) -> Plan:
    """Estimates from shapes alone; layers of one parent and width are taken to read one input, as q, k and v do."""
    width = _hidden_width(model, sites)
    tokens = samples.positions
    activations = streams * tokens * width * dtype.itemsize * (2 if mapped else 1)
    sizes = [_block_bytes(model.get_submodule(name), dtype) for name in blocks]
    by_block = [[site for site in sites if site.name.startswith(f"{name}.")] for name in blocks]
    statistics = max((_gram_bytes(own) for own in by_block), default=0)
    solver = max(
        (SOLVER_COPIES * _members(s) * s.shape[-1] ** 2 * 4 + WEIGHT_COPIES * s.count * 4 for s in sites), default=0
    )
    stored = sum(site.count for site in sites)  # at most a byte a weight, as a rule half of that
    return Plan(activations, max(sizes), statistics, solver, stored + (activations if mapped else 0))


def check_plan(wanted: Plan, device: torch.device, folder: Path | None, mapped: bool) -> str | None:
    """What is likely to go wrong, as a note. Raises OptionError when the disk certainly is too small."""
    if folder is not None and mapped and wanted.activations > free_disk_bytes(folder):
        raise OptionError(
            f"The job keeps {human(wanted.activations)} of activations on disk, but only "
            f"{human(free_disk_bytes(folder))} are free at '{folder}'; use fewer --samples or another --work-dir."
        )
    free = available_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    needed = wanted.device + (0 if mapped or device.type != "cpu" else wanted.activations)
    if free is not None and needed > free:
        return f"the job needs about {human(needed)} on {device.type}, and {human(free)} are free"
    return None


def fits_memory(wanted: Plan, device: torch.device) -> bool:
    """Whether activations can stay in host memory."""
    free = available_bytes()
    needed = wanted.activations + (wanted.device if device.type == "cpu" else 0)
    return free is None or needed <= SPARE * free


def _hidden_width(model: nn.Module, sites: Sequence[Site]) -> int:
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config
    width = getattr(text, "hidden_size", None)
    return int(width) if width else min((site.shape[-1] for site in sites), default=1)


def _block_bytes(block: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in block.parameters()) * dtype.itemsize


def _gram_bytes(sites: Sequence[Site]) -> int:
    inputs = {(site.name.rpartition(".")[0], site.shape[-1]): _members(site) for site in sites}
    return sum(members * width**2 * 4 for (_, width), members in inputs.items())


def _members(site: Site) -> int:
    return site.shape[0] if len(site.shape) == 3 else 1
