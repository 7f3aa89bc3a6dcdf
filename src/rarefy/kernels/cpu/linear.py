"""The op over execution layouts: a sum of prepared terms times activations, by the native library. CPU only.

* ``rarefy::linear_prepared(x, <stored>, fast)``: ``x @ weight.T`` for ``x [..., columns]`` in 16 or 32 bits, result of
  that dtype ``[..., rows]``; differentiable in ``x``;
* ``rarefy::decode_prepared(<stored>)``: the weight, float32 ``[rows, columns]``.

``<stored>`` is tensors, numbers, factors, rows and columns. Terms follow each other: per term ``SLOTS`` tensors,
``NUMBERS`` whole numbers, and as factors its zero point and multiplier.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import FormatError
from rarefy.kernels.cpu.library import _loaded, follow_threads
from rarefy.kernels.cpu.prepared import BF16, F16, F32, NUMBERS, SLOTS, Prepared

EXACT, FAST = 0, 1
ACTIVATIONS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}

# rarefy_term of csrc/rarefy.h: 8 int32, 5 int64, 2 float, 7 spans of pointer and bytes.
_TERM = struct.Struct("8i5q2f14q")
TERM_BYTES = _TERM.size
_MESSAGE = 512

_library = torch.library.Library("rarefy", "FRAGMENT")
_STORED = "Tensor[] tensors, int[] numbers, float[] factors, int rows, int columns"


def linear(x: Tensor, terms: Sequence[Prepared], fast: bool = False) -> Tensor:
    """``x @ weight.T`` for the sum of ``terms``; ``x [..., columns]`` in float32, float16 or bfloat16 on the CPU.

    ``fast`` quantizes activations to 8 bits for each token and block of columns. Raises FormatError naming a tensor
    whose size contradicts its description.
    """
    if _unwatched(x):  # the dispatcher costs as much as a small product
        return _product(x, b"".join(map(_packed, terms)), len(terms), terms[0].rows, terms[0].columns, fast)
    return torch.ops.rarefy.linear_prepared(x, *_flat(terms), fast)  # type: ignore[no-any-return]


def decode(terms: Sequence[Prepared]) -> Tensor:
    """The dense sum of ``terms``, float32 ``[rows, columns]``, bit for bit what the reference decodes of each."""
    return torch.ops.rarefy.decode_prepared(*_flat(terms))  # type: ignore[no-any-return]


def packed(terms: Sequence[Prepared]) -> bytes:
    """The array of ``rarefy_term`` of csrc/rarefy.h; valid as long as the tensors of ``terms`` stay where they are."""
    return _pack(*_flat(terms)[:3])


def check(term: Prepared) -> None:
    """Raise FormatError when a tensor of ``term`` has a wrong size or leads out of bounds."""
    message = ctypes.create_string_buffer(_MESSAGE)
    packed = _pack(*_flat([term])[:3])
    _answer(_loaded().rarefy_check(packed, message, _MESSAGE), message)


def _unwatched(x: Tensor) -> bool:
    """Whether nobody but the kernel has to know of a product with ``x``: no gradient, trace, mode or transform."""
    return (
        type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None  # type: ignore[no-untyped-call]
    )


def _packed(term: Prepared) -> bytes:
    """One ``rarefy_term``, packed anew when a tensor is elsewhere or of another size."""
    places = tuple([(tensor.data_ptr(), tensor.nbytes) for tensor in term.tensors.values()])
    if term.packed is None or term.packed[0] != places:
        term.packed = places, _pack(*_flat([term])[:3])
    return term.packed[1]


def _flat(terms: Sequence[Prepared]) -> tuple[list[Tensor], list[int], list[float], int, int]:
    tensors = [tensor for term in terms for tensor in term.slots()]
    numbers = [number for term in terms for number in term.listed()]
    factors = [factor for term in terms for factor in (term.zero, term.multiplier)]
    return tensors, numbers, factors, terms[0].rows, terms[0].columns


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
    flat = x.reshape(-1, columns)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    follow_threads()
    arguments = (
        terms, count, flat.data_ptr(), flat.stride(0), y.data_ptr(), rows, ACTIVATIONS[x.dtype], flat.shape[0],
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


def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], arguments[3])


def _fake_decode(tensors: list[Tensor], *arguments: Any) -> Tensor:
    return tensors[0].new_empty(arguments[2], arguments[3], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.stored = inputs[1:6]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight = torch.ops.rarefy.decode_prepared(*ctx.stored)
    return grad @ weight.to(grad.dtype), [None] * len(ctx.stored[0]), None, None, None, None, None


for _op, _schema, _kernel, _fake in (
    ("linear_prepared", f"(Tensor x, {_STORED}, bool fast) -> Tensor", _linear, _fake_linear),
    ("decode_prepared", f"({_STORED}) -> Tensor", _decode, _fake_decode),
):
    _library.define(f"{_op}{_schema}")
    _library.impl(_op, _kernel, "CPU")
    torch.library.register_fake(f"rarefy::{_op}", _fake, lib=_library)
torch.library.register_autograd("rarefy::linear_prepared", _backward, setup_context=_keep, lib=_library)
