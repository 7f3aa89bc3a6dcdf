"""How a grid's scales and zeros are stored: plainly, or two-level with a few bits each.

``store`` takes what a fit wants, float32 ``[..., rows, groups]``, and returns what will be stored; ``load`` returns
the float32 numbers that a reader of the stored tensors sees. Codes must be chosen against ``load(store(...))``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy.core.config import StrictModel
from rarefy.formats.layout import FLOATS, FloatName, Layout, Size, TensorLayout
from rarefy.kernels.reference.decode import group_scales, spread_tiles

Params = dict[str, Tensor]


class SingleScale(StrictModel):
    """One floating-point scale (and zero) per group."""

    rows: ClassVar[int] = 1
    groups: ClassVar[int] = 1
    type: Literal["single"] = "single"
    dtype: FloatName = "float16"

    @property
    def tile(self) -> list[int]:
        return []

    def layout(self, rows: int, groups: int, zero: bool) -> Layout:
        dtype = FLOATS[self.dtype]
        plain = TensorLayout(dtype, (rows, groups), "scales")
        return {"scale": plain, "zero_point": plain} if zero else {"scale": plain}

    def store(self, scale: Tensor, zero: Tensor | None) -> Params:
        dtype = FLOATS[self.dtype]
        params = {"scale": scale.to(dtype)}
        if zero is not None:
            params["zero_point"] = zero.to(dtype)
        return params

    def load(self, params: Params) -> tuple[Tensor, Tensor | None]:
        zero = params.get("zero_point")
        return params["scale"].float(), None if zero is None else zero.float()


class BilevelScale(StrictModel):
    """Scales and zeros of ``rows x groups`` tiles, quantized with ``scale_bits`` and ``zero_bits`` by a step and a zero
    of their own (SpQR, Dettmers et al. 2023, section 4; k-quants are the case of one row and several groups).

    Stored: ``scale`` uint8 ``[rows, groups]`` = scale code + 16 * zero code when both fit 4 bits, otherwise
    ``[rows, groups, 2]``; ``second_order`` ``[row tiles, group tiles, 2 or 4]`` = step and zero of the scales, then
    of the zeros.
    """

    type: Literal["bilevel"] = "bilevel"
    scale_bits: int = Field(3, ge=1, le=8)
    zero_bits: int = Field(3, ge=1, le=8)
    rows: Size = 16
    groups: Size = 1
    dtype: FloatName = "float16"

    @property
    def tile(self) -> list[int]:
        return [self.rows, self.groups]

    @property
    def nibbles(self) -> bool:
        return self.scale_bits <= 4 and self.zero_bits <= 4

    def layout(self, rows: int, groups: int, zero: bool) -> Layout:
        first = (rows, groups) if self.nibbles else (rows, groups, 2)
        tiles = (-(-rows // self.rows), -(-groups // self.groups), 4 if zero else 2)
        return {
            "scale": TensorLayout(torch.uint8, first, "scales"),
            "second_order": TensorLayout(FLOATS[self.dtype], tiles, "scales"),
        }

    def store(self, scale: Tensor, zero: Tensor | None) -> Params:
        scale_code, scale_order = self._quantize(scale, self.scale_bits)
        if zero is None:
            zero_code, order = torch.zeros_like(scale_code), scale_order
        else:
            zero_code, zero_order = self._quantize(zero, self.zero_bits)
            order = torch.cat([scale_order, zero_order], dim=-1)
        first = scale_code | (zero_code << 4) if self.nibbles else torch.stack([scale_code, zero_code], dim=-1)
        return {"scale": first, "second_order": order}

    def load(self, params: Params) -> tuple[Tensor, Tensor | None]:
        return group_scales(params["scale"], params["second_order"], self.tile)

    def choices(self, params: Params) -> Iterator[Params]:
        """``params`` with every pair of codes in turn, the same one in all groups; only those kept in ``nibbles``: with
        more bits the nearest codes lose nothing that a search could win."""
        zeros = 1 << self.zero_bits if params["second_order"].shape[-1] == 4 else 1
        for scale, zero in product(range(1 << self.scale_bits), range(zeros)) if self.nibbles else ():
            yield {**params, "scale": torch.full_like(params["scale"], scale | zero << 4)}

    def _quantize(self, numbers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Codes uint8 ``[rows, groups]``, second order ``[row tiles, group tiles, 2]``: a min/max grid per tile."""
        dtype, (rows, groups) = FLOATS[self.dtype], numbers.shape
        height, width = min(self.rows, rows), min(self.groups, groups)
        pad = (0, -groups % width, 0, -rows % height)
        tiled = torch.nn.functional.pad(numbers[None], pad, mode="replicate")[0] if any(pad) else numbers
        tiled = tiled.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        low, high = tiled.amin((1, 3)), tiled.amax((1, 3))
        reach = torch.maximum(low.abs(), high.abs())
        # A tile far from zero keeps a step that its zero can resolve.
        finest = reach * finest_step(self.dtype)
        step = torch.maximum((high - low) / ((1 << bits) - 1), finest).to(dtype)
        # A tile of equal numbers c, or of numbers too small for their step to be stored, has step |c| and code 1 or
        # zero point 1: exact up to the step's own rounding, and never a zero step.
        flat = (high == low) | (step == 0)
        step = torch.where(flat, reach.to(dtype), step)
        step = torch.where(step == 0, torch.ones_like(step), step)
        zero = torch.where(flat, (high < 0).float(), -low / step.float())
        order = torch.stack([step, zero.to(dtype)], dim=-1)
        spread = spread_tiles(order, [height, width], rows, groups)
        codes = torch.round(numbers / spread[..., 0] + spread[..., 1]).clamp_(0, (1 << bits) - 1)
        return codes.to(torch.uint8), order


def finest_step(dtype: FloatName) -> float:
    """The smallest step, as a share of the largest number, whose zero point a stored ``dtype`` can still place.

    Below it the zero point would overflow, or lie coarser than the numbers themselves are.
    """
    return torch.finfo(FLOATS[dtype]).eps / 16


AnyScale = Annotated[SingleScale | BilevelScale, Field(discriminator="type")]

