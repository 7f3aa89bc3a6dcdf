"""What a term stores: the table from tensor name to dtype, shape and purpose, and how a file's header is held to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from rarefy.core.errors import FormatError

Purpose = Literal["codes", "scales", "tables", "indices", "values", "transform", "entries"]

# The only dtypes a rarefy term puts on disk, by their safetensors names.
DTYPES = {
    "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Sizes in a description: kernels count in 32 bits, and a number beyond them is damage, never a real weight.
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]

FloatName = Literal["float16", "bfloat16", "float32"]
FLOATS: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class TensorLayout:
    """One stored tensor. A string in ``shape`` is a size that depends on the data (such as the number of kept entries)
    and is read from the file; the same name means the same size within one term."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    purpose: Purpose


Layout = dict[str, TensorLayout]


def prefixed(prefix: str, layout: Layout) -> Layout:
    """The layout of a part, under the part's name; its data-dependent sizes stay apart from those of other parts."""

    def own(size: int | str) -> int | str:
        return f"{prefix}.{size}" if isinstance(size, str) else size

    return {
        f"{prefix}.{name}": TensorLayout(tensor.dtype, tuple(own(size) for size in tensor.shape), tensor.purpose)
        for name, tensor in layout.items()
    }


def bind(layout: Layout, found: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]], owner: str) -> dict[str, int]:
    """Match the tensors ``found`` (dtype, shape) against ``layout``; return the data-dependent sizes.

    Raises FormatError naming the first tensor (as ``owner.name``) that is missing or has another dtype or shape.
    """
    sizes: dict[str, int] = {}
    for name, expected in layout.items():
        if name not in found:
            raise FormatError(f"tensor '{owner}.{name}' is missing")
        dtype, shape = found[name]
        if dtype != expected.dtype:
            raise FormatError(f"tensor '{owner}.{name}' is {dtype}, expected {expected.dtype}")
        if len(shape) != len(expected.shape):
            raise FormatError(f"tensor '{owner}.{name}' has shape {list(shape)}, expected {list(expected.shape)}")
        for actual, wanted in zip(shape, expected.shape, strict=True):
            known = sizes.setdefault(wanted, actual) if isinstance(wanted, str) else wanted
            if known != actual:
                raise FormatError(f"tensor '{owner}.{name}' has shape {list(shape)}, expected {list(expected.shape)}")
    return sizes
