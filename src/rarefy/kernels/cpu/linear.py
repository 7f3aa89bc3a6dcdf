"""The ops over execution layouts (``kernels/prepared.py``) by the native library: on the CPU, in 16 or 32 bits."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.core.errors import FormatError
from rarefy.kernels import prepared
from rarefy.kernels.cpu.library import _loaded, follow_threads
from rarefy.kernels.cpu.prepared import BF16, F16, F32, NUMBERS, SLOTS, Prepared
from rarefy.kernels.prepared import decode, flat, library

EXACT, FAST = 0, 1
ACTIVATIONS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}

# rarefy_term of csrc/rarefy.h: 8 int32, 5 int64, 2 float, 7 spans of pointer and bytes.
_TERM = struct.Struct("8i5q2f14q")
TERM_BYTES = _TERM.size
_MESSAGE = 512

__all__ = ["ACTIVATIONS", "TERM_BYTES", "check", "decode", "linear", "packed"]


def linear(x: Tensor, terms: Sequence[Prepared], fast: bool = False) -> Tensor:
    """``kernels.prepared.linear`` on the CPU, past the dispatcher where nobody but the kernel has to know of it."""
    if _unwatched(x):  # the dispatcher costs as much as a small product
        return _product(x, b"".join(map(_packed, terms)), len(terms), terms[0].rows, terms[0].columns, fast)
    return prepared.linear(x, terms, fast)


def packed(terms: Sequence[prepared.Prepared]) -> bytes:
    """The array of ``rarefy_term`` of csrc/rarefy.h; valid as long as the tensors of ``terms`` stay where they are."""
    return _pack(*flat(terms)[:3])


def check(term: prepared.Prepared) -> None:
    """Raise FormatError when a tensor of ``term`` has a wrong size or leads out of bounds."""
    message = ctypes.create_string_buffer(_MESSAGE)
    packed = _pack(*flat([term])[:3])
    _answer(_loaded().rarefy_check(packed, message, _MESSAGE), message)


def _unwatched(x: Tensor) -> bool:
    """Whether nobody but the kernel has to know of a product with ``x``: no gradient, trace, mode or transform."""
    return (
        type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None  # type: ignore[no-untyped-call]
    )


def _packed(term: Prepared) -> bytes:
    """One ``rarefy_term``, packed anew when a tensor is elsewhere or of another size."""
    places = tuple([(tensor.data_ptr(), tensor.nbytes) for tensor in term.tensors.values()])
    if term.packed is None or term.packed[0] != places:
        term.packed = places, _pack(*flat([term])[:3])
    return term.packed[1]


def _pack(tensors: Sequence[Tensor], numbers: Sequence[int], factors: Sequence[float]) -> bytes:
    """Terms as the library reads them. Sizes travel along, and the library holds them against the numbers."""
    count = len(factors) // 2
    if len(tensors) != count * len(SLOTS) or len(numbers) != count * len(NUMBERS):
        raise FormatError(f"{len(tensors)} tensors and {len(numbers)} numbers do not describe {count} terms.")
    parts = []
    for term in range(count):
        spans = []
        for tensor in tensors[term * len(SLOTS) : (term + 1) * len(SLOTS)]:
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise FormatError("Prepared tensors have to be contiguous and on the CPU; prepare the layer again.")
            size = tensor.numel() * tensor.element_size()
            spans += [tensor.data_ptr() if size else 0, size]
        own = numbers[term * len(NUMBERS) : (term + 1) * len(NUMBERS)]
        parts.append(_TERM.pack(*own, factors[2 * term], factors[2 * term + 1], *spans))
    return b"".join(parts)


def _answer(code: int, message: ctypes.Array[ctypes.c_char]) -> None:
    if code != 0:
        raise FormatError(message.value.decode())


def _linear(
    x: Tensor, tensors: list[Tensor], numbers: list[int], factors: list[float], rows: int, columns: int, fast: bool
) -> Tensor:
    terms = _pack(tensors, numbers, factors)
    if _shape(numbers) != (rows, columns):
        raise FormatError(f"The terms are of shape {list(_shape(numbers))}, not {[rows, columns]}.")
    return _product(x, terms, len(factors) // 2, rows, columns, fast)


def _product(x: Tensor, terms: bytes, count: int, rows: int, columns: int, fast: bool) -> Tensor:
    """``terms``: ``count`` of them, packed, the first of ``rows`` and ``columns``."""
    if x.shape[-1] != columns:
        raise FormatError(f"The input has {x.shape[-1]} channels, but the weight has {columns} columns.")
    if x.dtype not in ACTIVATIONS:
        raise FormatError(f"The input is {x.dtype}; native kernels take float32, float16 or bfloat16.")
    # A call into torch costs as much as the product of some thousand weights.
    flat = x if x.is_contiguous() else x.reshape(-1, columns)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    stride = columns if flat is x else flat.stride(0)
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    follow_threads()
    arguments = (
        terms, count, flat.data_ptr(), stride, y.data_ptr(), rows, ACTIVATIONS[x.dtype], flat.numel() // columns,
        FAST if fast else EXACT,
    )  # fmt: skip
    if _loaded().rarefy_linear(*arguments, None, 0) != 0:  # once more, for the sentence
        message = ctypes.create_string_buffer(_MESSAGE)
        _answer(_loaded().rarefy_linear(*arguments, message, _MESSAGE), message)
    return y


def _decode(tensors: list[Tensor], numbers: list[int], factors: list[float], rows: int, columns: int) -> Tensor:
    terms = _pack(tensors, numbers, factors)
    if _shape(numbers) != (rows, columns):
        raise FormatError(f"The terms are of shape {list(_shape(numbers))}, not {[rows, columns]}.")
    weight = torch.empty(rows, columns, dtype=torch.float32)
    message = ctypes.create_string_buffer(_MESSAGE)
    follow_threads()
    _answer(_loaded().rarefy_decode(terms, len(factors) // 2, weight.data_ptr(), message, _MESSAGE), message)
    return weight


def _shape(numbers: Sequence[int]) -> tuple[int, int]:
    return numbers[NUMBERS.index("rows")], numbers[NUMBERS.index("columns")]


library.impl("linear_prepared", _linear, "CPU")
library.impl("decode_prepared", _decode, "CPU")
