"""Attention of many queries over listed blocks of keys, by the native library. CPU only; see csrc/blocks.h."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rarefy.core.errors import FormatError
from rarefy.kernels.cpu.attend import TYPES
from rarefy.kernels.cpu.library import _loaded, available, follow_threads

WIDTH, QUERIES = 256, 1024  # most channels of a head and queries of a block
_MESSAGE = 512
_Strides = ctypes.c_int64 * 3


class _Call(ctypes.Structure):
    """rarefy_chosen of csrc/blocks.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "lse")),
        *((name, ctypes.c_void_p) for name in ("start", "count", "columns", "low", "high")),
        *((f"{name}_strides", _Strides) for name in ("query", "key", "value", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "lists", "queries", "keys", "width")),
        *((name, ctypes.c_int64) for name in ("block_q", "block_k", "entries")),
        ("type", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


def fits(query: Tensor, value: Tensor, block_q: int) -> bool:
    """Whether the library can attend ``query [B, H, Q, D]`` to values ``[B, Hkv, L, D]``."""
    channels = query.shape[3]
    return (
        query.dtype in TYPES and channels % 16 == 0 and channels <= WIDTH and value.shape[3] == channels
        and block_q <= QUERIES
    )  # fmt: skip


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, count: Tensor, columns: Tensor, low: Tensor,
    high: Tensor, *, block_q: int, block_k: int, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of ``query [B, H, Q, D]`` over the listed blocks of ``key``, ``value [B, Hkv, L, D]``, in one dtype.

    ``start``, ``count`` int32 ``[B, M, query blocks]`` and ``columns`` int32 as in a block map, with M a divisor of H;
    ``low``, ``high`` int32 ``[B, Q]``: a query sees keys ``[low, high)``. The result lies as ``[B, Q, H, D]`` and is
    returned as ``[B, H, Q, D]``, with the log-sum-exp float32 ``[B, H, Q]``. Raises FormatError where sizes are wrong
    or a list names a block that does not exist.
    """
    batch, heads, queries, channels = query.shape
    shape = (batch, key.shape[1], key.shape[2], channels)
    lines = (batch, count.shape[1], -(-queries // block_q))
    given = (key.shape, value.shape, start.shape, count.shape, low.shape, high.shape)
    if given != (shape, shape, lines, lines, (batch, queries), (batch, queries)):
        raise FormatError(f"Attention over blocks of {block_q} queries is given tensors of shapes {given}.")
    numbers, whole = (query, key, value), (start, count, columns, low, high)
    if any(x.dtype != query.dtype or x.device.type != "cpu" for x in numbers) or not fits(query, value, block_q):
        raise FormatError(f"Attention over blocks does not take {channels} channels of {query.dtype}.")
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in numbers)
    start, count, columns, low, high = (x.to(torch.int32).contiguous() for x in whole)
    out = query.new_empty(batch, queries, heads, channels).transpose(1, 2)
    lse = torch.empty(batch, heads, queries)
    pointers = (x.data_ptr() for x in (query, key, value, out, lse, start, count, columns, low, high))
    call = _Call(
        *pointers, *(_Strides(*x.stride()[:3]) for x in (query, key, value, out)), batch, heads, shape[1],
        count.shape[1], queries, shape[2], channels, block_q, block_k, columns.numel(), TYPES[query.dtype], scaling,
    )  # fmt: skip
    follow_threads()
    size = _loaded().rarefy_blocks_bytes(ctypes.byref(call))
    memory = torch.empty(size + 64, dtype=torch.uint8)
    message = ctypes.create_string_buffer(_MESSAGE)
    failed = _loaded().rarefy_attend_blocks(
        ctypes.byref(call), memory.data_ptr() + -memory.data_ptr() % 64, size, message, _MESSAGE
    )
    if failed:
        raise FormatError(f"{message.value.decode()}.")
    return out, lse


__all__ = ["attend_blocks", "available", "fits"]
