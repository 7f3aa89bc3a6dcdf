"""What every grid does: fit parameters to values, turn values into codes and codes into values.

A grid works on *blocks* ``[row groups, column groups, members]``: all members of a block share parameters. ``split``
and ``join`` go between a weight ``[rows, columns]`` and its blocks. A ragged last block is completed by repeating its
last value with importance zero, in this view only: stored codes are never padded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.config import StrictModel
from rarefy.core.errors import FormatError
from rarefy.formats.layout import Layout, Size
from rarefy.formats.scales import AnyScale, SingleScale

Params = dict[str, Tensor]
# Parameters as numbers to compute with, each ``[row groups, column groups, ...]``.
Numbers = dict[str, Tensor]
# Values of one column, float32 ``[rows]``, and its column group -> codes (whole numbers of any dtype) and what they
# stand for.
Rounding = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Grid(StrictModel, ABC):
    """A set of representable values with parameters per group of ``group_size`` input columns (None: the whole row)."""

    family: ClassVar[str]  # the op family of kernels/ops.py that reads it
    searchable: ClassVar[bool] = True  # whether shrinking the range is a meaningful search

    type: str
    group_size: Size | None = None

    @property
    @abstractmethod
    def code_count(self) -> int:
        """Number of codes."""

    @property
    def code_bits(self) -> int:
        """Bits of one code in a bit stream."""
        return max(1, (self.code_count - 1).bit_length())

    @abstractmethod
    def propose(self, blocks: Tensor, importance: Tensor | None, shrink: Tensor | None = None) -> Params:
        """Float32 parameters ``[row groups, column groups, ...]`` for ``blocks``, with the range shrunk by a factor
        (float64, one or ``[row groups, 1]``)."""

    @abstractmethod
    def round(self, params: Params) -> Params:
        """Proposed parameters as they will be stored (bits not yet packed); nothing here waits for the device, so that
        numbers which do not fit become infinite, and ``check`` finds them."""

    @abstractmethod
    def load(self, params: Params) -> Numbers:
        """Rounded parameters as the numbers that encoding and decoding read."""

    @abstractmethod
    def encode_loaded(self, blocks: Tensor, numbers: Numbers) -> Tensor:
        """The nearest codes, uint8."""

    @abstractmethod
    def decode_loaded(self, codes: Tensor, numbers: Numbers) -> Tensor:
        """Values of codes, float32."""

    def encode_blocks(self, blocks: Tensor, params: Params) -> Tensor:
        """The nearest codes, uint8, for rounded parameters."""
        return self.encode_loaded(blocks, self.load(params))

    def decode_blocks(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, float32, for rounded parameters."""
        return self.decode_loaded(codes, self.load(params))

    def height(self, rows: int) -> int:
        """Rows of a weight with ``rows`` whose parameters belong together and must be fitted at once."""
        return 1

    @property
    def span(self) -> int:
        """Column groups whose parameters belong together and must be fitted at once."""
        return 1

    def rounding(self, params: Params) -> Rounding:
        """What rounds single columns of a weight with these rounded parameters, which are read once."""
        numbers = self.load(params)
        narrow = self.model_copy(update={"group_size": 1})

        def round_column(column: Tensor, group: int) -> tuple[Tensor, Tensor]:
            own = {name: tensor[:, group : group + 1] for name, tensor in numbers.items()}
            codes = self.encode_loaded(narrow.split(column[:, None]), own)
            values = narrow.join(self.decode_loaded(codes, own), column.numel(), 1)
            return narrow.join(codes, column.numel(), 1)[:, 0], values[:, 0]

        return round_column

    def even(self, params: Params) -> tuple[Tensor, Tensor] | None:
        """Scale and zero, float32 ``[column groups, rows]``, where values are ``scale * (code - zero)``; else None."""
        return None

    @abstractmethod
    def layout(self, rows: int, columns: int) -> Layout:
        """Stored parameter tensors (after ``pack_params``) of a weight ``[rows, columns]``."""

    def pack_params(self, params: Params) -> Params:
        """Rounded parameters as stored tensors."""
        return params

    def error(self, blocks: Tensor, importance: Tensor | None, params: Params, norm: float = 2.0) -> Tensor:
        """Sum of ``importance * |value - decoded| ** norm`` per block ``[row groups, column groups]``."""
        numbers = self.load(params)
        difference = (blocks - self.decode_loaded(self.encode_loaded(blocks, numbers), numbers)).abs().pow_(norm)
        return (difference if importance is None else difference * importance).sum(-1)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        """Rounded parameters for ``weight [rows, columns]`` by the grid's own rule (min/max or its exact optimum).

        ``importance`` (same shape, or None) says how much each squared error counts; members of a block where it is
        all zero count equally. Raises FormatError when the weight or the importance is not finite, the importance is
        negative, or a parameter cannot be stored.
        """
        check_numbers(weight, importance)
        params = self.round(self.propose(*self.prepare(weight, importance)))
        self.check(params)
        return params

    def prepare(self, weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Float32 blocks of a weight and of its importance; a completed block marks its filling with zero."""
        weight = weight.detach().float()
        if importance is None and not self._ragged(*weight.shape):
            return self.split(weight), None
        filled = self.split(torch.ones_like(weight), fill=False)
        if importance is None:
            return self.split(weight), filled
        parts = self.split(importance.detach().float(), fill=False)
        return self.split(weight), torch.where(parts.sum(-1, keepdim=True) == 0, filled, parts)

    def check(self, params: Params) -> None:
        """Raise FormatError when a number among rounded ``params`` could not be stored."""
        for name, stored in params.items():
            if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
                what, dtype = name.replace("_", " "), str(stored.dtype).removeprefix("torch.")
                raise FormatError(f"A {what} overflows {dtype}; store scales in bfloat16 or float32.")

    def encode(self, weight: Tensor, params: Params) -> Tensor:
        """Codes uint8 ``[rows, columns]`` of ``weight`` for rounded parameters; FormatError when it is not finite."""
        check_numbers(weight)
        return self.join(self.encode_blocks(self.split(weight.detach().float()), params), *weight.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values float32 ``[rows, columns]`` of ``codes`` for rounded parameters."""
        return self.join(self.decode_blocks(self.split(codes), params), *codes.shape)

    def groups(self, columns: int) -> int:
        """Column groups of a row."""
        return -(-columns // self.size(columns))

    def size(self, columns: int) -> int:
        """Columns of a full group; a group longer than the row is the row."""
        return min(self.group_size or columns, columns) or 1

    def split(self, weight: Tensor, fill: bool = True) -> Tensor:
        """``[rows, columns] -> [rows, groups, size]``; a short last group repeats its last value (``fill``) or zero."""
        rows, columns = weight.shape
        missing = -columns % self.size(columns)
        if missing:
            tail = weight[:, -1:].expand(rows, missing) if fill else weight.new_zeros(rows, missing)
            weight = torch.cat([weight, tail], dim=1)
        return weight.reshape(rows, self.groups(columns), self.size(columns))

    def join(self, blocks: Tensor, rows: int, columns: int) -> Tensor:
        """Inverse of ``split`` for a weight of ``[rows, columns]``."""
        return blocks.reshape(rows, -1)[:, :columns]

    def _ragged(self, rows: int, columns: int) -> bool:
        return bool(columns % self.size(columns))


class ScaledGrid(Grid):
    """A grid whose groups have scales, which may be quantized tile by tile."""

    scales: AnyScale = SingleScale()

    def height(self, rows: int) -> int:
        return min(self.scales.rows, rows) or 1

    @property
    def span(self) -> int:
        return self.scales.groups


def shrunk(values: Tensor, factor: Tensor | None) -> Tensor:
    """``values`` times a factor, which is rounded to their dtype first."""
    return values if factor is None else values * factor.to(values.dtype)


def check_numbers(weight: Tensor, importance: Tensor | None = None) -> None:
    """Raise FormatError when a weight is not finite in 32 bits, or its importance is not finite or negative."""
    finite = torch.isfinite(weight.detach().float())
    if not bool(finite.all()):  # counting takes longer, and is for the sentence only
        bad = int((~finite).sum())
        raise FormatError(f"The weight holds {bad} NaN or infinite values; repair or ignore this layer.")
    if importance is not None and not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise FormatError("The importance of a weight is NaN, infinite or negative; repair the calibration data.")
