"""Several processes on one job (``torchrun``): each sees its share of the data and solves its share of the layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rarefy.core.errors import OptionError


class Ranks:
    """This process among ``size`` of them. With one, nothing is sent anywhere."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None):
        self.rank, self.size = rank, size
        # NCCL moves tensors between GPUs, gloo between CPUs.
        self.device = device if device is not None and device.type == "cuda" else torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to the person."""
        return self.rank == 0

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.size > 1:
            for tensor in tensors:
                moved = tensor.to(self.device)
                torch.distributed.all_reduce(moved)
                tensor.copy_(moved)

    def share(self, costs: Sequence[float]) -> list[int]:
        """The rank for each job: the dearest first, always to the rank that has least to do."""
        load, owners = [0.0] * self.size, [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
            owners[job] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[owners[job]] += costs[job]
        return owners

    def spread(self, data: Mapping[str, Tensor], about: str, owner: int) -> tuple[dict[str, Tensor], str]:
        """Tensors and a text that ``owner`` has, at every rank; what the others pass is ignored."""
        if self.size == 1:
            return dict(data), about
        from safetensors.torch import load, save

        payload = torch.empty(0, dtype=torch.uint8)
        if self.rank == owner:
            raw = save({**data, "about": torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8)})
            payload = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        length = torch.tensor([payload.numel()], device=self.device)
        torch.distributed.broadcast(length, owner)
        buffer = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == owner:
            buffer.copy_(payload)
        torch.distributed.broadcast(buffer, owner)
        found = load(buffer.cpu().numpy().tobytes())
        text = found.pop("about").numpy().tobytes().decode()
        return found, text

    def everyones(self, text: str) -> list[str]:
        """What each rank says, at every rank."""
        return [self.spread({}, text, rank)[1] for rank in range(self.size)]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            self.add_([torch.zeros(1)])


def ranks_of(device: torch.device) -> tuple[Ranks, torch.device]:
    """The process's place as ``torchrun`` tells it, and its own device. Joins the process group on first use.

    Raises OptionError when there are fewer GPUs than processes on this host.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks(), device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise OptionError(f"Process {local} has no GPU of its own; start at most {torch.cuda.device_count()}.")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device), device
