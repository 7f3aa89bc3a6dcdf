"""Codes of a grid at the positions of a pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rarefy import packing
from rarefy.core.errors import FormatError
from rarefy.formats.grids import AnyGrid, BinaryGrid, FloatGrid, Grid, IntegerGrid, LevelGrid, LutGrid, Params
from rarefy.formats.inputs import AnyInput, RawInput
from rarefy.formats.layout import Layout, TensorLayout
from rarefy.formats.patterns import AnyPattern, Full, Groups, Pattern
from rarefy.formats.terms.base import Shape, Term, TermSpec, op_arguments
from rarefy.kernels import native, ops

CodePacking = Literal["bitstream", "planes", "radix"]


class QuantizedSpec(TermSpec):
    """Quantized(grid, pattern). ``packing`` follows the grid unless bit ``planes`` are asked for.

    ``multiplier`` adds one float32 factor for the whole weight, for weights whose scales would leave 16-bit range.
    """

    type: Literal["quantized"] = "quantized"
    grid: AnyGrid
    pattern: AnyPattern = Full()
    packing: CodePacking = "bitstream"
    multiplier: bool = False

    def model_post_init(self, context: object) -> None:
        if (self.packing == "radix") != isinstance(self.grid, LevelGrid):
            raise ValueError("packing 'radix' goes with the 'level' grid, and only with it")
        if self.packing == "planes" and not isinstance(self.pattern, Full):
            raise ValueError("packing 'planes' needs the 'full' pattern")
        if self.pattern.group is None:
            return
        if isinstance(self.grid, LutGrid | BinaryGrid):
            if self.grid.group_size is not None:
                raise ValueError("a group pattern needs tables without column groups")
        elif self.grid.group_size != self.pattern.group:
            raise ValueError(f"a groups pattern of {self.pattern.group} needs grid.group_size {self.pattern.group}")

    def member_layout(self, rows: int, columns: int) -> Layout:
        layout = {"codes": self._codes_layout(rows, columns)}
        layout.update(self._params_layout(rows, columns))
        layout.update(self.pattern.layout(rows, columns))
        if self.multiplier:
            layout["multiplier"] = TensorLayout(torch.float32, (), "scales")
        return layout

    def build(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Quantized:
        return Quantized(self, shape, tensors)

    def _codes_layout(self, rows: int, columns: int) -> TensorLayout:
        *lead, last = self.pattern.kept_shape(rows, columns)
        bits = self.grid.code_bits
        if self.packing == "radix":
            radix = self.grid.code_count
            count: int | str = "words" if isinstance(last, str) else packing.radix_words(last, radix)
            return TensorLayout(packing.RADIX[radix][1], (*lead, count), "codes")
        count = "words" if isinstance(last, str) else packing.words(last)
        if self.packing == "planes":
            return TensorLayout(torch.int32, (bits, *lead, count), "codes")
        return TensorLayout(torch.int32, (*lead, count, bits), "codes")

    def _params_layout(self, rows: int, columns: int) -> Layout:
        layout = self.grid.layout(rows, columns)
        if not isinstance(self.pattern, Groups) or self.grid.family == "lut":
            return layout
        # One entry per kept group; the second order of two-level scales stays that of the dense weight.
        kept: tuple[int | str, ...] = (rows, "groups") if self.pattern.index == "ids" else ("groups",)
        for name in ("scale", "zero_point"):
            entry = layout.get(name)
            if entry is None:
                continue
            if name == "zero_point" and entry.dtype == torch.int32:
                layout[name] = TensorLayout(torch.int32, ("zero_words", self.grid.code_bits), "scales")
            else:
                layout[name] = TensorLayout(entry.dtype, (*kept, *entry.shape[2:]), "scales")
        return layout


class Quantized(Term):
    """Codes of a grid: the stored form of a quantized weight, sparse or not."""

    spec: QuantizedSpec

    def __init__(self, spec: QuantizedSpec, shape: Shape, tensors: Mapping[str, Tensor]):
        super().__init__(spec, shape)
        self._register(tensors)
        self.family = spec.grid.family
        self.has_multiplier = spec.multiplier
        self._names, self._plain = _op_binding(spec, self.rows, self.columns)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        params: Params,
        grid: Grid,
        *,
        pattern: Pattern | None = None,
        mask: Tensor | None = None,
        planes: bool = False,
        multiplier: float | None = None,
        input: AnyInput | None = None,
        input_tensors: Mapping[str, Tensor] | None = None,
    ) -> Quantized:
        """Pack dense ``codes [rows, columns]`` and rounded ``params`` of ``grid``; ``mask`` (bool) says what is kept.

        Raises FormatError when the mask breaks the pattern, a code is not one of the grid's, or a parameter is not
        finite.
        """
        grid.check(params)
        spec = QuantizedSpec(
            grid=grid,  # type: ignore[arg-type]
            pattern=pattern or Full(),  # type: ignore[arg-type]
            packing="radix" if isinstance(grid, LevelGrid) else "planes" if planes else "bitstream",
            multiplier=multiplier is not None,
            input=input or RawInput(),
        )
        kept = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask
        positions = spec.pattern.store(kept)  # first, since it refuses masks that cannot be gathered
        tensors = {"codes": spec_pack(spec, spec.pattern.gather(codes, kept))}
        per_group = {
            name: tensor if name in ("lut", "second_order") else spec.pattern.gather_params(tensor, kept)
            for name, tensor in params.items()
        }
        tensors.update(grid.pack_params(per_group))
        tensors.update(positions)
        if multiplier is not None:
            tensors["multiplier"] = torch.tensor(multiplier, dtype=torch.float32, device=codes.device)
        tensors.update(input_tensors or {})
        return cls(spec, tuple(codes.shape), {name: tensor.contiguous() for name, tensor in tensors.items()})

    def operation(self) -> tuple[str, tuple[Any, ...], float]:
        multiplier = float(self.get_buffer("multiplier")) if self.has_multiplier else 1.0
        return self.family, op_arguments(self, self._names, self._plain), multiplier

    def _operands(self) -> list[str]:
        return [name for name in self._names if name and self._buffers.get(name) is not None]

    def product(self, x: Tensor) -> Tensor:
        if (made := self.prepared_for(x)) is not None:
            return native.linear(x, [made], self.fast)
        y = ops.linear(self.family, x, op_arguments(self, self._names, self._plain))
        if not self.has_multiplier:
            return y
        # In 32 bits: the factor itself may lie outside the range of 16-bit floats.
        return (y.to(torch.promote_types(y.dtype, torch.float32)) * self.get_buffer("multiplier")).to(y.dtype)

    def decode_member(self) -> Tensor:
        if self._prepared is not None:
            return native.decode([self._prepared])
        weight = ops.decode_weight(self.family, op_arguments(self, self._names, self._plain))
        return weight * self.get_buffer("multiplier") if self.has_multiplier else weight

    def check_member(self) -> None:
        kept = self.spec.pattern.check(self.own_tensors(), self.rows, self.columns)
        slots = kept * (self.spec.pattern.group or 1)
        if isinstance(self.spec.pattern.kept_shape(1, 1)[-1], str) and self.spec.pattern.type != "full":
            self._check_flat(kept, slots)
        self._check_codes()

    def _check_flat(self, kept: int, slots: int) -> None:
        """Data-dependent sizes must agree with the positions (a stack pads its members to the largest)."""
        codes = self.get_buffer("codes")
        per_word = packing.RADIX[self.spec.grid.code_count][0] if self.spec.packing == "radix" else packing.WORD
        ids = getattr(self.spec.pattern, "index", None) == "ids"
        words = codes.shape[1] * self.rows if ids and self.rows else codes.shape[0]
        if words * per_word < slots:
            raise FormatError(f"'codes' hold {words * per_word} codes for {slots} kept weights")
        if self.spec.pattern.group is not None and self.family != "lut" and (groups := self._group_count()) < kept:
            raise FormatError(f"'scale' holds {groups} numbers for {kept} kept groups")

    def _group_count(self) -> int:
        """Groups that have a scale; a group's scale may be two bytes or two numbers."""
        flat = self.spec.pattern.group is not None and getattr(self.spec.pattern, "index", None) != "ids"
        return self.get_buffer("scale").shape[: 1 if flat else 2].numel()

    def _check_codes(self) -> None:
        codes, count = self.get_buffer("codes"), self.spec.grid.code_count
        if self.spec.packing == "radix":
            per_word, _ = packing.RADIX[count]
            if bool(((codes < 0) | (codes.to(torch.int64) >= count**per_word)).any()):
                raise FormatError(f"'codes' hold a word beyond {count} ** {per_word}")
        elif count != 1 << (bits := self.spec.grid.code_bits):
            planes = self.spec.packing == "planes"
            unpack, words = (packing.unpack_planes, -1) if planes else (packing.unpack_bits, -2)
            if bool((unpack(codes, bits, codes.shape[words] * packing.WORD) >= count).any()):
                raise FormatError(f"'codes' point beyond the {count} entries of their table")
        zero = self._buffers.get("zero_point")
        if zero is not None and zero.dtype == torch.int32:
            needed = packing.words(self._group_count())
            if zero.shape[0] < needed:
                raise FormatError(f"'zero_point' has {zero.shape[0]} words, {needed} are needed")


def spec_pack(spec: QuantizedSpec, kept: Tensor) -> Tensor:
    """Kept codes in the spec's packing."""
    if spec.packing == "radix":
        return packing.pack_radix(kept, spec.grid.code_count)
    if spec.packing == "planes":
        return packing.pack_planes(kept, spec.grid.code_bits)
    return packing.pack_bits(kept, spec.grid.code_bits)


def _op_binding(spec: QuantizedSpec, rows: int, columns: int) -> tuple[tuple[str | None, ...], tuple[Any, ...]]:
    """Names of the tensor arguments, then the plain arguments, of the grid's op (see kernels/ops.py)."""
    grid, pattern = spec.grid, spec.pattern
    positions = "bitmap" if "bitmap" in pattern.layout(1, 1) else "indices"
    place = (pattern.name, pattern.block, spec.packing)
    if isinstance(grid, IntegerGrid | LevelGrid):
        names: tuple[str | None, ...] = ("codes", "scale", "zero_point", "second_order", positions, "row_ptr")
        plain: tuple[Any, ...] = (*place, grid.code_count, grid.group_size or 0, grid.scales.tile)
    elif isinstance(grid, FloatGrid):
        names = ("codes", "scale", "second_order", positions, "row_ptr")
        plain = (*place, grid.format, grid.group_size or 0, grid.scales.tile)
    else:
        names = ("codes", "lut", positions, "row_ptr")
        plain = (*place, grid.code_bits, grid.height(rows), grid.group_size or 0)
    return names, (*plain, rows, columns)
