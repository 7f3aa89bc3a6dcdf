"""Floating-point code formats (FP3/FP4/FP6/FP8, NF3/NF4) with one scale per group, or one for each sign."""

from __future__ import annotations

import functools
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rarefy.formats.grids.base import Numbers, Params, ScaledGrid, shrunk
from rarefy.formats.layout import FLOATS, Layout, TensorLayout
from rarefy.formats.scales import SingleScale
from rarefy.kernels.reference import tables

FormatName = Literal["fp3", "fp4", "nf3", "nf4", "fp6_e2m3", "fp8_e4m3", "fp8_e5m2"]


class FloatGrid(ScaledGrid):
    """``value = scale * table[code]`` with the table of a named format.

    ``two_scales`` gives positive and negative values a scale each (AFPQ, Zhang et al. 2023): ``scale`` is then
    ``[rows, groups, 2]`` = (positive, negative), and a side without values borrows the other side's scale.
    A group of zeros has scale 0.
    """

    family: ClassVar[str] = "float"
    type: Literal["float"] = "float"
    format: FormatName = "fp4"
    two_scales: bool = False

    @property
    def code_count(self) -> int:
        return 1 << tables.FORMATS[self.format]

    def model_post_init(self, context: object) -> None:
        if self.two_scales and not isinstance(self.scales, SingleScale):
            raise ValueError("two_scales needs scales of type 'single'")

    def propose(self, blocks: Tensor, importance: Tensor | None, shrink: Tensor | None = None) -> Params:
        values = tables.table(self.format, blocks.device)
        positive = shrunk(blocks.amax(-1).clamp(min=0), shrink) / values.max()
        negative = shrunk(blocks.amin(-1).clamp(max=0), shrink) / values.min()
        if not self.two_scales:
            return {"scale": torch.maximum(positive, negative)}
        sides = torch.stack([positive, negative], dim=-1)
        return {"scale": torch.where(sides == 0, sides.flip(-1), sides)}

    def error(self, blocks: Tensor, importance: Tensor | None, params: Params, norm: float = 2.0) -> Tensor:
        if not self.two_scales:
            return super().error(blocks, importance, params, norm)
        numbers = self.load(params)
        difference = (blocks - self.decode_loaded(self.encode_loaded(blocks, numbers), numbers)).abs().pow_(norm)
        difference = difference if importance is None else difference * importance
        # The two sides do not touch each other: each side's best scale is found on its own.
        below = (blocks < 0).float()
        return torch.stack([(difference * (1 - below)).sum(-1), (difference * below).sum(-1)], dim=-1)

    def round(self, params: Params) -> Params:
        if not self.two_scales:
            return self.scales.store(params["scale"], None)
        assert isinstance(self.scales, SingleScale)
        return {"scale": params["scale"].to(FLOATS[self.scales.dtype])}

    def load(self, params: Params) -> Numbers:
        if not self.two_scales:
            return {"scale": self.scales.load(params)[0].unsqueeze(-1)}
        positive, negative = params["scale"].float().unsqueeze(-2).unbind(-1)
        return {"scale": positive, "negative": negative}

    def encode_loaded(self, blocks: Tensor, numbers: Numbers) -> Tensor:
        scale = _scale_of(blocks, numbers)
        # A float8 weight at the edge of its range may exceed the table by rounding of the scale: nearest is the edge.
        scaled = torch.where(scale == 0, 0.0, blocks / scale)
        boundaries, codes = nearest(self.format, blocks.device)
        return codes[torch.bucketize(scaled.contiguous(), boundaries)]

    def decode_loaded(self, codes: Tensor, numbers: Numbers) -> Tensor:
        values = tables.table(self.format, codes.device)[codes.to(torch.int32)]
        return values * _scale_of(values, numbers)

    def layout(self, rows: int, columns: int) -> Layout:
        groups = self.groups(columns)
        if not self.two_scales:
            return self.scales.layout(rows, groups, False)
        assert isinstance(self.scales, SingleScale)
        return {"scale": TensorLayout(FLOATS[self.scales.dtype], (rows, groups, 2), "scales")}


def _scale_of(values: Tensor, numbers: Numbers) -> Tensor:
    negative = numbers.get("negative")
    return numbers["scale"] if negative is None else torch.where(values < 0, negative, numbers["scale"])


@functools.lru_cache(maxsize=16)
def nearest(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints between the distinct values of a format, and the code of each value (+0 for zero)."""
    values, codes = torch.sort(tables.table(name), stable=True)
    keep = torch.ones_like(values, dtype=torch.bool)
    keep[1:] = values[1:] != values[:-1]
    values, codes = values[keep], codes[keep]
    return ((values[1:] + values[:-1]) / 2).to(device), codes.to(device, torch.uint8)
