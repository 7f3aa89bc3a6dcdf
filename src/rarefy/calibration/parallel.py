"""Several processes on one job (``torchrun``): each sees its share of the data and solves its share of the layers."""

from __future__ import annotations

import atexit
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import Tensor

from rarefy.core.errors import OptionError, RarefyError, UnsupportedError, first_line


class PeerError(RarefyError):
    """Another process of the job failed; the sentence is the one it ended with."""


class Ranks:
    """This process among ``size`` of them. With one, nothing is sent anywhere.

    Every exchange starts with a word from each process whether it is well. One that failed says so (see ``together``)
    where the others expect an exchange, and all of them end with its error instead of waiting for ever.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        carrier: torch.device | None = None,
        connecting: threading.Thread | None = None,
    ):
        self.rank, self.size, self._connecting = rank, size, connecting
        # NCCL moves tensors between GPUs, gloo between CPUs.
        self.device = carrier or torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to the person."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Tell all processes of an error that ends the work in this one: they raise PeerError. Without one, all leave
        when the last has what it was sent."""
        try:
            yield
            self.wait()
        except PeerError:
            raise
        except Exception as failure:
            if self.size > 1:
                self._meet(str(failure) or type(failure).__name__)
            raise

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.size > 1:
            self._meet()
            for tensor in tensors:
                moved = tensor.to(self.device)
                torch.distributed.all_reduce(moved)
                tensor.copy_(moved)

    def all(self, answer: bool) -> bool:
        """Whether every rank says yes."""
        no = torch.tensor([0 if answer else 1])
        self.add_([no])
        return not int(no)

    def share(self, costs: Sequence[float]) -> list[int]:
        """The rank for each job: the dearest first, always to the rank that has least to do."""
        load, owners = [0.0] * self.size, [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
            owners[job] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[owners[job]] += costs[job]
        return owners

    def spread(self, data: Mapping[str, Tensor], about: str, owner: int) -> tuple[dict[str, Tensor], str]:
        """Tensors and a text that ``owner`` has, at every rank; what the others pass is ignored. The tensors come out
        on the device between whose kind ranks move them."""
        if self.size == 1:
            return dict(data), about
        header = ""
        if self.rank == owner:
            described = [[name, str(own.dtype).removeprefix("torch."), list(own.shape)] for name, own in data.items()]
            header = json.dumps([about, described])
        self._meet()
        text, described = json.loads(_as_text(self._broadcast(_as_tensor(header), owner)))
        found: dict[str, Tensor] = {}
        for name, dtype, shape in described:
            if self.rank == owner:
                found[name] = data[name].to(self.device).contiguous()
            else:
                found[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            if found[name].numel():
                # As bytes, since backends differ in the dtypes that they move.
                torch.distributed.broadcast(found[name].reshape(-1).view(torch.uint8), owner)
        return found, text

    def tell(self, text: str) -> str:
        """What the leading rank says, at every rank."""
        return self.spread({}, text, 0)[1]

    def everyones(self, text: str) -> list[str]:
        """What each rank says, at every rank."""
        return [self.spread({}, text, rank)[1] for rank in range(self.size)]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            self._meet()

    def _meet(self, failure: str | None = None) -> None:
        """The word at the start of an exchange. Raises PeerError when another rank brings a ``failure``."""
        if self._connecting is not None:
            self._connecting.join()
        try:
            failed = torch.zeros(self.size, dtype=torch.int64, device=self.device)
            failed[self.rank] = failure is not None
            torch.distributed.all_reduce(failed)
            first = next((rank for rank, flag in enumerate(failed.tolist()) if flag), None)
            if first is None:
                return
            sentence = _as_text(self._broadcast(_as_tensor(failure or ""), first))
        except RuntimeError as broken:
            if failure is not None:
                return  # the others are gone too; this rank's own error is the one to see
            raise PeerError(f"A process of this job died ({first_line(broken)}); see what it said, and start again.")  # noqa: B904
        if failure is None:
            raise PeerError(f"Process {first} of {self.size} stopped: {sentence}")

    def _broadcast(self, payload: Tensor, owner: int) -> Tensor:
        length = torch.tensor([payload.numel()], device=self.device)
        torch.distributed.broadcast(length, owner)
        buffer = payload.to(self.device) if self.rank == owner else payload.new_empty(int(length), device=self.device)
        torch.distributed.broadcast(buffer, owner)
        return buffer.cpu()


def ranks_of(device: torch.device) -> tuple[Ranks, torch.device]:
    """The process's place as ``torchrun`` tells it, and its own device. Joins the process group on first use.

    Raises OptionError when there are fewer GPUs than processes on this host.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks(), device
    if not torch.distributed.is_available():
        raise UnsupportedError("This build of torch has no torch.distributed; start one process without torchrun.")
    local, connecting = int(os.environ.get("LOCAL_RANK", "0")), None
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise OptionError(f"Process {local} has no GPU of its own; start at most {torch.cuda.device_count()}.")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        # One rank may solve for long while the others wait; a rank that fails says so.
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=7))
        # A group that is still there when the interpreter ends may abort the process.
        atexit.register(_leave)
        # GPUs take a second or two to find each other, in which the model's code can be imported.
        connecting = threading.Thread(target=_connect, args=(device,), daemon=True)
        connecting.start()
    # A process group that was here before may carry tensors of the other kind.
    carrier = torch.device("cuda", local) if "nccl" in torch.distributed.get_backend() else torch.device("cpu")
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), carrier, connecting), device


def _connect(device: torch.device) -> None:
    """A first exchange; what fails in it fails again where somebody waits for it."""
    with suppress(RuntimeError):
        torch.distributed.all_reduce(torch.zeros(1, device=device))


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _as_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _as_text(tensor: Tensor) -> str:
    return tensor.numpy().tobytes().decode()
