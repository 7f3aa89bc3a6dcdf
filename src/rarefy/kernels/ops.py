"""Every op of compressed weights, declared once: schema, shapes for tracing, gradient to ``x``, reference kernel.

For each family of stored tensors there are two ops with the same arguments:

* ``rarefy::decode_<family>(...)``: the dense weight, float32 ``[rows, columns]``;
* ``rarefy::linear_<family>(x, ...)``: ``x @ weight.T`` for ``x [..., columns]`` of any floating dtype, result of that
  dtype ``[..., rows]``. Differentiable in ``x`` only; backward keeps the stored tensors, never a dense weight.

Ops see tensors and numbers, never a Grid or a Term. Meanings of the arguments: ``reference/decode.py`` and
``reference/patterns.py``. A faster kernel registers itself for one device with ``register_kernel`` and answers
to the same schema; the reference serves every device that has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rarefy.kernels.reference import decode

_PLACE = "Tensor? positions, Tensor? row_ptr, str pattern, int[] block"

# family -> (schema of the stored tensors, reference decoder). The last two arguments are always rows and columns.
FAMILIES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "integer": (
        f"Tensor codes, Tensor scale, Tensor? zero_point, Tensor? second_order, {_PLACE}, str packing, int levels, "
        "int group_size, int[] tile, int rows, int columns",
        decode.decode_integer,
    ),
    "float": (
        f"Tensor codes, Tensor scale, Tensor? second_order, {_PLACE}, str packing, str format, "
        "int group_size, int[] tile, int rows, int columns",
        decode.decode_float,
    ),
    "lut": (
        f"Tensor codes, Tensor lut, {_PLACE}, str packing, int num_bits, int rows_per_lut, int group_size, "
        "int rows, int columns",
        decode.decode_lut,
    ),
    "values": (f"Tensor values, {_PLACE}, int rows, int columns", decode.decode_values),
    "csr": ("Tensor entries, Tensor row_ptr, bool half, int rows, int columns", decode.decode_csr),
}

_library = torch.library.Library("rarefy", "DEF")
_kernels: dict[str, dict[str, str]] = {}


def decode_weight(family: str, arguments: tuple[Any, ...]) -> Tensor:
    """The dense weight of stored ``arguments``, float32 ``[rows, columns]``."""
    return getattr(torch.ops.rarefy, f"decode_{family}")(*arguments)


def linear(family: str, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """``x @ weight.T`` for ``x [..., columns]``; result ``[..., rows]`` in the dtype of ``x``."""
    return getattr(torch.ops.rarefy, f"linear_{family}")(x, *arguments)


def register_kernel(op: str, dispatch_key: str, kernel: Callable[..., Tensor], name: str) -> None:
    """Serve ``rarefy::<op>`` on ``dispatch_key`` ("CPU", "CUDA") by ``kernel``; ``name`` is what ``kernels`` shows."""
    _library.impl(op, kernel, dispatch_key)
    _kernels.setdefault(op, {})[dispatch_key] = name


def kernels() -> dict[str, dict[str, str]]:
    """Op -> device -> name of the kernel that serves it ("any": the reference)."""
    return {op: dict(table) for op, table in _kernels.items()}


def _declare(family: str, schema: str, decoder: Callable[..., Tensor]) -> None:
    tensors = [index for index, part in enumerate(schema.split(", ")) if part.startswith("Tensor")]

    def reference_decode(*arguments: Any) -> Tensor:
        return decoder(*arguments).contiguous()

    def reference_linear(x: Tensor, *arguments: Any) -> Tensor:
        return torch.nn.functional.linear(x, decoder(*arguments).to(x.dtype))

    def fake_decode(*arguments: Any) -> Tensor:
        return arguments[0].new_empty(arguments[-2], arguments[-1], dtype=torch.float32)

    def fake_linear(x: Tensor, *arguments: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], arguments[-2])

    def keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        arguments = inputs[1:]
        ctx.save_for_backward(*(arguments[index] for index in tensors))
        ctx.plain = [None if index in tensors else value for index, value in enumerate(arguments)]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments = list(ctx.plain)
        for index, tensor in zip(tensors, ctx.saved_tensors, strict=True):
            arguments[index] = tensor
        weight = decode_weight(family, tuple(arguments))
        return grad @ weight.to(grad.dtype), *(None for _ in arguments)

    _check_signature(decoder, schema)
    for verb, prefix, kernel, fake in (
        ("decode", "", reference_decode, fake_decode),
        ("linear", "Tensor x, ", reference_linear, fake_linear),
    ):
        op = f"{verb}_{family}"
        _library.define(f"{op}({prefix}{schema}) -> Tensor")
        _library.impl(op, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rarefy::{op}", fake, lib=_library)
        _kernels[op] = {"any": "reference"}
    torch.library.register_autograd(f"rarefy::linear_{family}", backward, setup_context=keep_arguments, lib=_library)


def _check_signature(decoder: Callable[..., Tensor], schema: str) -> None:
    """Schema and oracle must not drift apart: same arguments, same order (``packing`` is a module name there)."""
    declared = [part.split(" ")[-1].replace("packing", "packing_name") for part in schema.split(", ")]
    written = list(inspect.signature(decoder).parameters)
    if declared != written:
        raise AssertionError(f"{decoder.__name__} takes {written}, its schema says {declared}")


for _family, (_schema, _decoder) in FAMILIES.items():
    _declare(_family, _schema, _decoder)
