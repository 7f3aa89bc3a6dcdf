"""Keys without their rotary position embedding by ``unrotate.cu``: what it is compiled for, and its launch."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rarefy.kernels.cuda import driver

SOURCE, ENTRY = Path(__file__).with_name("unrotate.cu"), "rarefy_unrotate"
TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
THREADS = 256


@dataclass(frozen=True)
class Form:
    """One compiled form: ``width`` of the ``channels`` turn."""

    channels: int
    width: int
    keys: torch.dtype
    angles: torch.dtype

    def definitions(self) -> dict[str, int]:
        """The macros of the source."""
        types = {"X": TYPES[self.keys], "ANGLE": TYPES[self.angles]}
        return {"D": self.channels, "WIDTH": self.width, **types, "HALF": 1}


class Arguments(ctypes.Structure):
    """``Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "out")),
        *((name, ctypes.c_longlong) for name in ("batch_stride", "head_stride", "token_stride", "angle_stride")),
        ("tokens", ctypes.c_int), ("heads", ctypes.c_int),
    ]  # fmt: skip


def fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel takes ``x [B, H, n, D]`` and angles ``[B or 1, 1, n, width]``."""
    if x.dim() != 4 or cos.dim() != 4 or not x.numel() or cos.shape != sin.shape or cos.dtype != sin.dtype:
        return False
    (batch, _, tokens, channels), (rows, ones, angles, width) = x.shape, cos.shape
    sizes = channels % 8 == 0 and 0 < width <= channels and width % 8 == 0
    matching = rows in (1, batch) and ones == 1 and angles == tokens
    near = x.stride(3) == 1 and all(stride % 4 == 0 for stride in x.stride()[:3])
    aligned = all(each.data_ptr() % (4 * each.element_size()) == 0 for each in (x, cos, sin))
    return sizes and matching and near and aligned and x.dtype in TYPES and cos.dtype in TYPES


def arguments(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> tuple[Form, tuple[int, int, int], Arguments]:
    """What is compiled, how many blocks of threads, and what they get; ``cos`` and ``sin`` are contiguous."""
    batch, heads, tokens, channels = x.shape
    width = cos.shape[-1]
    given = Arguments(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *x.stride()[:3],
        0 if cos.shape[0] == 1 else tokens * width, tokens, heads,
    )  # fmt: skip
    blocks = -(-tokens * (channels // 8) // THREADS)
    return Form(channels, width, x.dtype, cos.dtype), (blocks, batch * heads, 1), given


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``kv/rotary.py`` says, by one launch on the current stream, for tensors that ``fits`` accepts."""
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, device=x.device)
    form, grid, given = arguments(x, cos, sin, out)
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    _kernel(index, form)(grid, THREADS, given, torch.cuda.current_stream(x.device).cuda_stream)
    return out


@functools.cache
def _kernel(device: int, form: Form) -> driver.Kernel:
    macros = [f"-D{macro}={value}" for macro, value in form.definitions().items()]
    with torch.cuda.device(device):
        return driver.Kernel(SOURCE, ENTRY, ["-fmad=false", *macros], 0)
