"""Attention of a decoding step by ``attend_token.cu``; see ``kernels/triton/step.py`` for the portable one."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rarefy.kernels.cuda import driver, tuning

if TYPE_CHECKING:
    from rarefy.kernels.triton.step import Heads

SOURCE = Path(__file__).with_name("attend_token.cu")
WARPS = (8, 4)  # of a block, where there are few of them and where there are many
MANY = 132  # blocks, of which one fills a multiprocessor's registers
TILE = 16  # tokens that a warp takes at once
LEAST = 16  # tiles that are worth a block of their own
FILL = 264  # blocks that keep a large GPU busy
MOST_SPLITS = 64


_POINTERS = "q k v keys values key_steps value_steps positions turns q_gain k_gain out part arrived".split()


class Arguments(ctypes.Structure):
    """``Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_longlong) for name in ("sequence_stride", "head_stride")),
        *((name, ctypes.c_int) for name in "q_stride k_stride v_stride heads least window".split()),
        *((name, ctypes.c_float) for name in "q_eps k_eps scale softcap".split()),
    ]


@dataclass(frozen=True)
class Form:
    """What the kernel is told at compile time, see the source."""

    half: bool
    warps: int
    channels: int
    group: int
    q_kind: int
    k_kind: int
    capped: bool
    window: bool
    float8: bool

    def definitions(self) -> dict[str, int]:
        """The macros of the source."""
        return {
            "HALF": int(self.half), "CHANNELS": self.channels, "GROUP": self.group, "WARPS": self.warps,
            "Q_KIND": self.q_kind, "K_KIND": self.k_kind, "CAPPED": int(self.capped), "WINDOW": int(self.window),
            "FLOAT8": int(self.float8),
        }  # fmt: skip

    @property
    def shared_memory(self) -> int:
        """Bytes of a block."""
        return 4 * self.warps * self.group * (self.channels + 4)


def keeps_float8(device: torch.device) -> bool:
    """Whether the kernel can read and write E4M3 there."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def fits(dtype: torch.dtype, query_heads: int, heads: int, channels: int) -> bool:
    """Whether the kernel takes such heads."""
    group = query_heads // heads
    return dtype in (torch.bfloat16, torch.float16) and channels in (64, 128) and group <= 8


@functools.cache
def _kernel(device: int, form: Form) -> driver.Kernel:
    macros = [f"-D{macro}={value}" for macro, value in form.definitions().items()]
    with torch.cuda.device(device):
        return driver.Kernel(SOURCE, "rarefy_attend_token", macros, form.shared_memory)


class Attention:
    """As ``kernels/triton/step.py``'s, for heads that ``fits`` accepts and at least as many tokens of cache as a
    sequence has positions."""

    def __init__(self, sequences: int, query_heads: int, heads: int, channels: int, device: torch.device):
        pairs = sequences * heads
        self.splits = max(1, min(MOST_SPLITS, FILL // pairs))
        self.part = torch.empty(pairs, self.splits, query_heads // heads, channels + 2, device=device)
        self.arrived = torch.zeros(pairs, dtype=torch.int32, device=device)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, layer: Heads,
        steps: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``steps`` bfloat16 ``[2, M, heads, capacity]``: of keys and values in E4M3, finite even where nothing is."""
        out = q.new_empty(len(q), layer.query_heads * layer.channels)
        q_weight, k_weight, q_eps, k_eps, q_kind, k_kind = layer.norms()
        key_steps, value_steps = (None, None) if steps is None else steps
        pointers = (
            q, k, v, keys, values, key_steps, value_steps, positions, layer.turns, q_weight, k_weight, out, self.part,
            self.arrived,
        )  # fmt: skip
        given = Arguments(
            *(None if each is None else each.data_ptr() for each in pointers), keys.stride(0), keys.stride(1),
            q.stride(0), k.stride(0), v.stride(0), layer.heads, LEAST, layer.window or 0, q_eps, k_eps, layer.scale,
            layer.softcap or 0.0,
        )  # fmt: skip
        group = layer.query_heads // layer.heads
        half, capped, window = q.dtype == torch.float16, layer.softcap is not None, layer.window is not None
        warps = WARPS[len(self.arrived) > MANY]
        form = Form(half, warps, layer.channels, group, q_kind, k_kind, capped, window, steps is not None)
        self.launch(form, (len(q) * layer.heads, self.splits, 1), given, q.device)
        return out

    def launch(self, form: Form, grid: tuple[int, int, int], given: Arguments, device: torch.device) -> None:
        """The kernel on the current stream of ``device``."""
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(device).cuda_stream
        _kernel(index, form)(grid, 32 * form.warps, given, stream, tuning.overlaps(device))
