"""Where layouts lie: one piece of memory for a whole model, in huge pages, in the order in which it is read.

A token reads every weight once. Spread over thousands of small pages, a third of that time goes to finding the pages.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.kernels.prepared import Prepared

LINE, HUGE = 64, 2 << 20
_MADV_HUGEPAGE = 14


def gather_(terms: Sequence[Prepared]) -> None:
    """Move the tensors of ``terms`` to one piece of memory, each at the start of a cache line; values stay the same."""
    places = [(made, name) for made in terms for name in made.tensors]
    if len({made.tensors[name].untyped_storage().data_ptr() for made, name in places}) < 2:
        return  # they are there already
    sizes = [made.tensors[name].numel() * made.tensors[name].element_size() for made, name in places]
    memory = in_huge_pages(sum(-(-size // LINE) * LINE for size in sizes))
    start = 0
    for (made, name), size in zip(places, sizes, strict=True):
        tensor = made.tensors[name]
        place = memory[start : start + size].view(tensor.dtype).view(tensor.shape)
        made.tensors[name] = place.copy_(tensor)
        start += -(-size // LINE) * LINE


def in_huge_pages(size: int) -> Tensor:
    """``size`` bytes that begin where a huge page does, in such pages where the system gives them."""
    memory = torch.empty(size + HUGE, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE
    piece = memory[start : start + size]
    with contextlib.suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        advise(piece.data_ptr(), size // HUGE * HUGE, _MADV_HUGEPAGE)
    return piece
