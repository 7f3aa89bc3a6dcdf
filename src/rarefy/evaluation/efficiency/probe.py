"""Watching a job from a thread of its own: the memory it holds over time, and the energy it takes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

from rarefy.core.config import StrictModel

INTERVAL = 0.01
# Points of a timeline that a picture can show.
SHOWN = 200
POWERCAP = Path("/sys/class/powercap")
Counter = Callable[[], float]


class MemoryUse(StrictModel):
    """Bytes held while a job ran: of the process, or of tensors on a GPU. ``timeline``: (seconds, bytes), thinned out
    to the largest of each stretch; ``capacity_bytes``: what the device has, 0 where it does not say."""

    mean_bytes: float
    peak_bytes: int
    capacity_bytes: int
    timeline: tuple[tuple[float, int], ...]

    @property
    def utilization(self) -> float | None:
        """Mean share of the device's memory: (1/T) * integral of used / capacity."""
        return self.mean_bytes / self.capacity_bytes if self.capacity_bytes else None


class Energy(StrictModel):
    """``joules`` of a job as ``source`` counted them: the GPU's own counter (nvml), that of the processor packages
    (powercap), or ``modelled`` as a power that somebody stated times the time. Neighbours on the machine count too."""

    joules: float
    watts: float
    source: Literal["nvml", "powercap", "modelled"]


class Probe:
    """``with Probe(device) as probe: job()``; then ``memory()`` and ``energy()`` say what the job took.

    ``watts``: a stated mean power, for machines that cannot be asked.
    """

    def __init__(self, device: torch.device, watts: float | None = None, interval: float = INTERVAL):
        self._device, self._watts, self._interval = device, watts, interval
        self._samples: list[tuple[float, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._counter = energy_counter(device)
        self._joules: float | None = None
        self.seconds = 0.0

    def __enter__(self) -> Probe:
        self._before = None if self._counter is None else self._counter()
        self._start = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._thread.join()
        self._sample()
        if self._counter is not None and self._before is not None:
            self._joules = self._counter() - self._before

    def memory(self) -> MemoryUse:
        """What was held, by time."""
        held = [size for _, size in self._samples]
        stretch = -(-len(held) // SHOWN)
        shown = [
            max(self._samples[start : start + stretch], key=lambda sample: sample[1])
            for start in range(0, len(held), stretch)
        ]
        return MemoryUse(
            mean_bytes=sum(held) / len(held), peak_bytes=max(held), capacity_bytes=capacity(self._device),
            timeline=tuple((round(moment, 4), size) for moment, size in shown),
        )  # fmt: skip

    def energy(self) -> Energy | None:
        """What was taken, or None where nothing says."""
        if self._joules is not None:
            source: Literal["nvml", "powercap"] = "nvml" if self._device.type == "cuda" else "powercap"
            return Energy(joules=self._joules, watts=self._joules / self.seconds, source=source)
        if self._watts is None:
            return None
        return Energy(joules=self._watts * self.seconds, watts=self._watts, source="modelled")

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        self._samples.append((time.perf_counter() - self._start, held_bytes(self._device)))


def held_bytes(device: torch.device) -> int:
    """Bytes of tensors on a GPU, else those of this process in memory; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def capacity(device: torch.device) -> int:
    """Bytes of memory that ``device`` has; 0 where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def energy_counter(device: torch.device, root: Path = POWERCAP) -> Counter | None:
    """A function that gives joules so far, or None where the machine has no counter that may be read."""
    return _nvml(device) if device.type == "cuda" else _powercap(root)


def _nvml(device: torch.device) -> Counter | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000


def _powercap(root: Path) -> Counter | None:
    """The sum over processor packages; each counter starts again at a size that it states."""
    files = sorted(root.glob("intel-rapl:[0-9]*/energy_uj"))
    packages = [path for path in files if path.parent.name.count(":") == 1]
    try:
        last = [int(path.read_text("ascii")) for path in packages]
        sizes = [int(path.with_name("max_energy_range_uj").read_text("ascii")) for path in packages]
    except (OSError, ValueError):
        return None
    if not packages:
        return None
    turns = [0] * len(packages)

    def joules() -> float:
        for index, path in enumerate(packages):
            now = int(path.read_text("ascii"))
            turns[index] += now < last[index]
            last[index] = now
        return sum(now + turn * size for now, turn, size in zip(last, turns, sizes, strict=True)) / 1e6

    return joules
