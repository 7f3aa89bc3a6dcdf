"""Terms of floating-point values: all of them, some of them, or a few that correct another term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rarefy import packing
from rarefy.core.errors import FormatError
from rarefy.formats.inputs import AnyInput, RawInput
from rarefy.formats.layout import FLOATS, FloatName, Layout, TensorLayout
from rarefy.formats.patterns import AnyPattern, Bitmap, Pattern, check_row_pointer
from rarefy.formats.terms.base import Shape, Term, TermSpec, op_arguments
from rarefy.kernels import native, ops

PANEL = 1 << 16  # columns that a 16-bit column number can name


class DenseSpec(TermSpec):
    """Every value, in a floating dtype."""

    type: Literal["dense"] = "dense"
    dtype: FloatName = "float16"

    def member_layout(self, rows: int, columns: int) -> Layout:
        return {"values": TensorLayout(FLOATS[self.dtype], (rows, columns), "values")}

    def build(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Dense:
        return Dense(self, shape, tensors)


class Dense(Term):
    """A dense floating-point weight; a factor of a product, or a part that is better left alone."""

    spec: DenseSpec

    def __init__(self, spec: DenseSpec, shape: Shape, tensors: Mapping[str, Tensor]):
        super().__init__(spec, shape)
        self._register(tensors)

    @classmethod
    def from_weight(cls, weight: Tensor, dtype: FloatName = "float16") -> Dense:
        """Store ``weight [*stack, rows, columns]``. Raises FormatError when a value does not fit ``dtype``."""
        return cls(DenseSpec(dtype=dtype), tuple(weight.shape), {"values": _store(weight, dtype)})

    def product(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.get_buffer("values").to(x.dtype))

    def decode_member(self) -> Tensor:
        return self.get_buffer("values").float()


class SparseSpec(TermSpec):
    """Floating-point values at the positions of a pattern; the others are zero."""

    type: Literal["sparse"] = "sparse"
    pattern: AnyPattern = Bitmap()
    dtype: FloatName = "float16"

    def member_layout(self, rows: int, columns: int) -> Layout:
        shape = self.pattern.kept_shape(rows, columns)
        return {"values": TensorLayout(FLOATS[self.dtype], shape, "values"), **self.pattern.layout(rows, columns)}

    def build(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Sparse:
        return Sparse(self, shape, tensors)


class Sparse(Term):
    """A pruned weight: kept values and where they are."""

    spec: SparseSpec

    def __init__(self, spec: SparseSpec, shape: Shape, tensors: Mapping[str, Tensor]):
        super().__init__(spec, shape)
        self._register(tensors)
        positions = "bitmap" if "bitmap" in spec.pattern.layout(1, 1) else "indices"
        self._names = ("values", positions, "row_ptr")
        self._plain = (spec.pattern.name, spec.pattern.block, self.rows, self.columns)

    @classmethod
    def from_weight(
        cls, weight: Tensor, mask: Tensor, pattern: Pattern | None = None, dtype: FloatName = "float16"
    ) -> Sparse:
        """Store ``weight [rows, columns]`` where ``mask`` (bool, same shape) is set."""
        spec = SparseSpec(pattern=pattern or Bitmap(), dtype=dtype)  # type: ignore[arg-type]
        positions = spec.pattern.store(mask)  # first, since it refuses masks that cannot be gathered
        tensors = {"values": _store(spec.pattern.gather(weight, mask), dtype), **positions}
        return cls(spec, tuple(weight.shape), tensors)

    def operation(self) -> tuple[str, tuple[Any, ...], float]:
        return "values", op_arguments(self, self._names, self._plain), 1.0

    def _operands(self) -> list[str]:
        return [name for name in self._names if self._buffers.get(name) is not None]

    def product(self, x: Tensor) -> Tensor:
        if (made := self.prepared_for(x)) is not None:
            return native.linear(x, [made], self.fast)
        return ops.linear("values", x, op_arguments(self, self._names, self._plain))

    def decode_member(self) -> Tensor:
        if self._prepared is not None:
            return native.decode([self._prepared])
        return ops.decode_weight("values", op_arguments(self, self._names, self._plain))

    def check_member(self) -> None:
        kept = self.spec.pattern.check(self.own_tensors(), self.rows, self.columns)
        group, values = self.spec.pattern.group or 1, self.get_buffer("values")
        slots = kept * group
        # A flat list may end in the filling of a stack, whole groups of it; numbers per row leave no room.
        if values.numel() < slots or values.numel() % group or (values.dim() == 2 and values.numel() != slots):
            raise FormatError(f"'values' holds {values.numel()} numbers for {slots} kept weights")


class ResidualSpec(TermSpec):
    """A few 16-bit corrections in compressed sparse rows, 32 bits each (value above, column below)."""

    type: Literal["residual"] = "residual"
    dtype: Literal["float16", "bfloat16"] = "float16"

    def member_layout(self, rows: int, columns: int) -> Layout:
        return {
            "entries": TensorLayout(torch.int32, ("kept",), "entries"),
            "row_ptr": TensorLayout(torch.int32, (_panels(columns), rows + 1), "indices"),
        }

    def build(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Residual:
        return Residual(self, shape, tensors)


class Residual(Term):
    """Outliers as what they add to the other terms, so that a sum of terms is exact addition and nothing is masked.

    Columns beyond 65536 lie in further panels, each with its own row pointers into the one list of entries.
    """

    spec: ResidualSpec

    def __init__(self, spec: ResidualSpec, shape: Shape, tensors: Mapping[str, Tensor]):
        super().__init__(spec, shape)
        self._register(tensors)
        self._plain = (spec.dtype == "float16", self.rows, self.columns)

    @classmethod
    def from_weight(
        cls,
        residual: Tensor,
        mask: Tensor,
        dtype: Literal["float16", "bfloat16"] = "float16",
        input: AnyInput | None = None,
        input_tensors: Mapping[str, Tensor] | None = None,
    ) -> Residual:
        """Store ``residual [rows, columns]`` where ``mask`` is set."""
        rows, columns = residual.shape
        values, numbers, pointers, start = [], [], [], 0
        for first in range(0, max(columns, 1), PANEL):
            panel = mask[:, first : first + PANEL]
            values.append(residual[:, first : first + PANEL][panel])
            numbers.append(panel.nonzero()[:, 1])
            pointers.append(torch.nn.functional.pad(panel.sum(1).cumsum(0), (1, 0)) + start)
            start = int(pointers[-1][-1])
        stored = _store(torch.cat(values), dtype)
        tensors = {
            "entries": packing.pack_entries(stored, torch.cat(numbers)),
            "row_ptr": torch.stack(pointers).to(torch.int32),
            **(input_tensors or {}),
        }
        return cls(ResidualSpec(dtype=dtype, input=input or RawInput()), (rows, columns), tensors)

    def operation(self) -> tuple[str, tuple[Any, ...], float]:
        return "csr", op_arguments(self, ("entries", "row_ptr"), self._plain), 1.0

    def _operands(self) -> list[str]:
        return ["entries", "row_ptr"]

    def product(self, x: Tensor) -> Tensor:
        if (made := self.prepared_for(x)) is not None:
            return native.linear(x, [made], self.fast)
        return ops.linear("csr", x, op_arguments(self, ("entries", "row_ptr"), self._plain))

    def decode_member(self) -> Tensor:
        if self._prepared is not None:
            return native.decode([self._prepared])
        return ops.decode_weight("csr", op_arguments(self, ("entries", "row_ptr"), self._plain))

    def check_member(self) -> None:
        pointer = self.get_buffer("row_ptr").to(torch.int64)
        entries = self.get_buffer("entries")
        check_row_pointer(torch.cat([pointer[0, :1], pointer[:, 1:].flatten()]), entries.numel())
        used = int(pointer[-1, -1])
        if not torch.equal(pointer[1:, 0], pointer[:-1, -1]):
            raise FormatError("'row_ptr' panels do not follow each other")
        values, column = packing.unpack_entries(entries, FLOATS[self.spec.dtype])
        if not bool(torch.isfinite(values).all()):
            raise FormatError("'entries' hold NaN or infinity")
        counts = pointer.diff(dim=1).flatten()
        line = torch.repeat_interleave(torch.arange(counts.numel(), device=column.device), counts)
        column = column[:used] + line // max(self.rows, 1) * PANEL
        if bool((column >= self.columns).any()):
            raise FormatError(f"'entries' name a column beyond {self.columns}")
        if bool(((line.diff() == 0) & (column.diff() <= 0)).any()):
            raise FormatError("'entries' of a row are not in ascending order of columns")


def _panels(columns: int) -> int:
    return max(1, -(-columns // PANEL))


def _store(weight: Tensor, dtype: FloatName) -> Tensor:
    stored = weight.detach().to(FLOATS[dtype])
    if not bool(torch.isfinite(stored).all()):
        raise FormatError(f"A value does not fit {dtype}; store this term in bfloat16 or float32.")
    return stored.contiguous()
