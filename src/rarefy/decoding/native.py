"""The native executor: a program handed to the C library (csrc/step.h) once, then one call for each step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.decoding.cache import KeyValues
from rarefy.decoding.program import Add, Attend, Cap, Embed, Gate, Norm, Operation, Program, Project, Rotate
from rarefy.formats.terms import Term
from rarefy.kernels.cpu import library
from rarefy.kernels.cpu.linear import TERM_BYTES, packed
from rarefy.kernels.cpu.memory import gather_
from rarefy.kernels.prepared import Prepared
from rarefy.layers.linear import CompressedLinear

Mode = Literal["exact", "fast"]

_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_CACHE_TYPES = (torch.float32, torch.float16)
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_MODES = {"exact": 0, "fast": 1}
_KINDS: dict[type[Operation], int] = {
    Embed: 0, Norm: 1, Project: 2, Rotate: 3, Attend: 4, Gate: 5, Add: 6, Cap: 7,
}  # fmt: skip
_LINE = 64


class _Operation(ctypes.Structure):
    """``rarefy_op`` of step.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in "kind x y z out type heads layer activation terms".split()),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "window")),
        *((name, ctypes.c_float) for name in ("eps", "scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("data", "bias", "first")),
    )


class _Program(ctypes.Structure):
    """``rarefy_program``."""

    _fields_ = (
        ("ops", ctypes.POINTER(_Operation)),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int32) for name in "count head buffers logits layers heads kv_heads".split()),
        ("head_dim", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
    )


class _Cache(ctypes.Structure):
    """``rarefy_cache``."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("capacity", ctypes.c_int64),
        ("length", ctypes.c_int64),
    )


class NativeExecutor:
    """Runs ``program`` natively in float32, with weights as they are stored.

    ``mode``: ``exact`` keeps activations in 32 bits, ``fast`` quantizes those that meet integer codes to 8. Raises
    UnsupportedError for what the library does not read, naming it.
    """

    chunk = 256  # tokens; more need more memory and gain no speed

    def __init__(self, program: Program, mode: Mode = "exact"):
        if not library.available():
            raise UnsupportedError(f"There is no native library: {library.status().reason}.")
        self.program, self.mode = program, mode
        self.name = f"native {library.instructions()} {mode}"
        self._library = _functions()
        self._kept: list[Any] = []  # what the structures point to
        self._names = {name: index for index, name in enumerate(program.buffers)}
        self._native = self._flatten()
        self.check()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def check(self) -> None:
        """Raise UnsupportedError with the library's sentence when it cannot run the program."""
        message = ctypes.create_string_buffer(256)
        if self._library.check(ctypes.byref(self._native), message, len(message)):
            raise UnsupportedError(f"The native step cannot run this model: {message.value.decode().rstrip('.')}.")

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of keys and values for a model of ``dtype``."""
        return dtype if dtype in _CACHE_TYPES else torch.float16

    def keeps(self, dtype: torch.dtype) -> bool:
        """Whether the library reads a cache of ``dtype``."""
        return dtype in _CACHE_TYPES

    def __call__(self, tokens: Tensor, cache: KeyValues, *, every: bool = False) -> Tensor:
        """As ``interpreter.run``; logits are float32."""
        count, end = len(tokens), cache.length + len(tokens)
        cache.reserve(end)
        if cache.keys.dtype not in _CACHE_TYPES:
            raise OptionError(f"The native step keeps float32 or float16, not a cache of {cache.keys.dtype}.")
        library.follow_threads()
        tokens = tokens.contiguous()
        native = ctypes.byref(self._native)
        size = self._library.bytes(native, count, end, _MODES[self.mode])
        if size > len(self._memory) - _LINE:
            self._memory = torch.empty(size + _LINE, dtype=torch.uint8)
        place = -(-self._memory.data_ptr() // _LINE) * _LINE
        logits = torch.empty(count if every else 1, self.program.vocabulary)
        held = _Cache(
            cache.keys.data_ptr(), cache.values.data_ptr(), _TYPES[cache.keys.dtype], cache.capacity, cache.length
        )
        message = ctypes.create_string_buffer(256)
        failed = self._library.step(
            native, ctypes.byref(held), tokens.data_ptr(), count, _MODES[self.mode], int(every), logits.data_ptr(),
            place, size, message, len(message),
        )  # fmt: skip
        if failed:
            raise OptionError(f"{message.value.decode()}.")
        cache.length = end
        return logits

    def _flatten(self) -> _Program:
        program = self.program
        operations = (_Operation * len(program.operations))()
        prepared = [_prepared(part) for part in program.operations]
        gather_([made for terms in prepared for made in terms])
        weights = [(packed(terms), terms) if terms else None for terms in prepared]
        # One array for all, since projections that run together need theirs together.
        array = ctypes.create_string_buffer(b"".join(data for data, _ in filter(None, weights)))
        self._kept += [array, [owner for _, owner in filter(None, weights)]]
        place = ctypes.addressof(array)
        for index, (operation, weight) in enumerate(zip(program.operations, weights, strict=True)):
            native = self._operation(operation)
            if weight is not None and isinstance(operation, Project):
                data, _ = weight
                native.terms, native.first = len(data) // TERM_BYTES, place
                place += len(data)
            operations[index] = native
        widths = (ctypes.c_int64 * len(self._names))(*program.buffers.values())
        self._kept += [operations, widths]
        return _Program(
            operations, widths, len(operations), len(program.step), len(self._names), self._names["logits"],
            program.layers, program.heads, program.kv_heads, program.head_dim, program.vocabulary,
        )  # fmt: skip

    def _operation(self, operation: Operation) -> _Operation:
        at = self._names
        native = _Operation(kind=_KINDS[type(operation)])
        match operation:
            case Embed(out, table, scale):
                native.out, native.scale = at[out], _rounded(scale, table.weight.dtype)
                native.rows, native.columns = table.weight.shape
                native.type, native.data = self._typed(table.weight, "the embedding")
            case Norm(x, out, weight, eps, centred, heads):
                native.x, native.out, native.heads, native.eps = at[x], at[out], heads, eps
                native.data = self._float(weight.float() + 1.0 if centred else weight)
            case Project(x, out, linear, name):
                native.x, native.out = at[x], at[out]
                native.rows, native.columns = linear.out_features, linear.in_features
                if not isinstance(linear, CompressedLinear):
                    native.type, native.data = self._typed(linear.weight, f"'{name}'")
                if linear.bias is not None:
                    native.bias = self._float(linear.bias)
            case Rotate(x, heads, inv_freq, scaling):
                native.x, native.heads, native.scale = at[x], heads, scaling
                native.data = inv_freq.data_ptr() if inv_freq.dtype == torch.float32 else self._float(inv_freq)
                self._kept.append(inv_freq)
            case Attend(q, k, v, out, layer, scale, window, softcap):
                native.x, native.y, native.z, native.out = at[q], at[k], at[v], at[out]
                native.layer, native.scale = layer, scale
                native.window, native.softcap = window or 0, softcap or 0.0
            case Gate(gate, up, out, activation):
                native.x, native.y, native.out = at[gate], at[up], at[out]
                native.activation = _ACTIVATIONS[activation]
            case Add(x, y):
                native.x, native.y = at[x], at[y]
            case Cap(x, cap):
                native.x, native.softcap = at[x], cap
        return native

    def _float(self, tensor: Tensor) -> int:
        """Address of ``tensor`` in float32."""
        plain = tensor.detach().float().contiguous()
        self._kept.append(plain)
        return plain.data_ptr()

    def _typed(self, tensor: Tensor, name: str) -> tuple[int, int]:
        """Type and address of a dense weight, which is not copied unless it lies in pieces."""
        if tensor.dtype not in _TYPES:
            raise UnsupportedError(f"The native step does not read {name} in {tensor.dtype}.")
        plain = tensor.detach().contiguous()
        self._kept.append(plain)
        return _TYPES[tensor.dtype], plain.data_ptr()


class _Functions:
    """The library's functions, with the types of what they take."""

    def __init__(self, loaded: ctypes.CDLL):
        pointer, whole, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_size_t
        program, cache, text = ctypes.POINTER(_Program), ctypes.POINTER(_Cache), ctypes.c_char_p
        self.check = self._declare(loaded.rarefy_step_check, number, program, text, size)
        self.bytes = self._declare(loaded.rarefy_step_bytes, whole, program, whole, whole, number)
        self.step = self._declare(
            loaded.rarefy_step, number, program, cache, pointer, whole, number, number, pointer, pointer, whole, text,
            size,
        )  # fmt: skip

    @staticmethod
    def _declare(function: Any, result: Any, *arguments: Any) -> Callable[..., int]:
        function.restype, function.argtypes = result, arguments
        return function


def _functions() -> _Functions:
    loaded = library.library()
    assert loaded is not None
    return _Functions(loaded)


def _rounded(value: float, dtype: torch.dtype) -> float:
    """``value`` as a model of ``dtype`` holds it."""
    return float(torch.tensor(value, dtype=dtype))


def _prepared(operation: Operation) -> list[Prepared]:
    """The terms of a compressed weight in the layouts that the library reads; none for whatever is not one."""
    if not isinstance(operation, Project) or not isinstance(operation.linear, CompressedLinear):
        return []
    found = []
    for term in operation.linear.terms:
        assert isinstance(term, Term)
        kind = type(term).__name__
        if term.transforms_input:
            raise UnsupportedError(f"'{operation.name}' has a {kind} term of a {term.spec.input.type} input.")
        made = term.prepare_()
        if made is None:
            reason = term.refused or f"a {kind} term"
            raise UnsupportedError(f"'{operation.name}' has {reason}, which the native step does not read.")
        found.append(made)
    return found
