"""What a device computes well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from rarefy.core.errors import OptionError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Device = Literal["auto", "cpu", "cuda"] | str


def check_dtype(dtype: str | torch.dtype, name: str = "dtype") -> None:
    """Raise OptionError, with the ``name`` of the option, unless ``dtype`` is a floating one, its name, or auto."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise OptionError(f"{name} '{dtype}' is unknown; use auto, float32, bfloat16 or float16.")


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """The dtype in which forward passes are fastest on ``device``: bfloat16 where the hardware multiplies it.

    CPUs without bfloat16 instructions emulate them several times slower than float32.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == "cpu":
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return torch.bfloat16 if probe is not None and probe() else torch.float32
    return torch.float32


def compute_dtype(stored: torch.dtype, device: str | torch.device) -> torch.dtype:
    """The dtype to run a model in that is stored in ``stored``: that one, or float32 where it would be emulated."""
    import torch

    native = (torch.float32, fast_dtype(device))
    return stored if torch.device(device).type == "cuda" or stored in native else torch.float32


def device_of(name: Device) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` means here. Raises OptionError."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"device '{name}' is unknown; use auto, cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device '{name}' is not supported; use auto, cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError("device 'cuda' was asked for, but torch sees no GPU; use --device cpu.")
    return device


def copy_to_cpu(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """What copies ``tensors``, as they are now, to the CPU, contiguous: a function for another thread, whose copies a
    GPU makes beside all that it is asked to compute from now on."""
    import torch

    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return lambda: {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(device))

    def copies() -> dict[str, Tensor]:
        stream = torch.cuda.Stream(device)
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    return copies


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute on the CPU with ``count`` threads, for work so small that handing it out costs more than doing it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
