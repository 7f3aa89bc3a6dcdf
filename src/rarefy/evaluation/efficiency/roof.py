"""The two limits of a machine that no model goes beyond: bytes from memory and multiplications a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rarefy.core.config import StrictModel

PASSES = 5
CPU_BYTES, GPU_BYTES = 1 << 28, 1 << 31  # beyond every cache
CPU_SIDE, GPU_SIDE = 1024, 8192


class Roof(StrictModel):
    """``bytes_per_second``: streamed from memory; ``flops_per_second``: of a large matrix product in ``dtype``. Both
    are the best of several passes on all threads that Torch uses."""

    bytes_per_second: float
    flops_per_second: float
    dtype: str

    def seconds(self, read: float, flops: float) -> float:
        """The least time in which ``read`` bytes and ``flops`` operations can be done (the roofline)."""
        return max(read / self.bytes_per_second, flops / self.flops_per_second)


@torch.inference_mode()
def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Measure ``device``; takes under a second."""
    gpu = device.type == "cuda"
    data = torch.ones((GPU_BYTES if gpu else CPU_BYTES) // 4, dtype=torch.float32, device=device)
    side = GPU_SIDE if gpu else CPU_SIDE
    square = torch.randn(side, side, device=device).to(dtype)
    read, product = _best(device, data.sum), _best(device, lambda: square @ square)
    return Roof(
        bytes_per_second=data.numel() * 4 / read, flops_per_second=2 * side**3 / product,
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def wait(device: torch.device) -> None:
    """Return when everything that was asked of ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best(device: torch.device, work: Callable[[], object]) -> float:
    times = []
    for _ in range(PASSES + 1):  # the first pass also warms up
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
