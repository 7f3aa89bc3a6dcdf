"""Evenly spaced values: integers with a scale and, if asked, a zero point; also ternary and five-level codes."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy import packing
from rarefy.formats.grids.base import Numbers, Params, ScaledGrid, shrunk
from rarefy.formats.layout import Layout, TensorLayout
from rarefy.formats.scales import SingleScale, finest_step


class _Affine(ScaledGrid):
    """``value = scale * (code - zero)``.

    ``zero``: ``none`` puts it at the middle code (symmetric), ``integer`` at a stored code (0 stays exactly
    representable), ``float`` anywhere (the range follows the group's minimum and maximum).

    A group of equal values is exact up to the scale's own rounding; a group of zeros has scale 0. Two-level zeros are
    kept among the codes: one far outside would coarsen those of all groups that share its tile.
    """

    family: ClassVar[str] = "integer"
    zero: Literal["none", "integer", "float"] = "none"

    def propose(self, blocks: Tensor, importance: Tensor | None, shrink: Tensor | None = None) -> Params:
        low, high = blocks.amin(-1), blocks.amax(-1)
        constant = (low == high) & (low != 0)
        middle = float(self.code_count // 2)
        if self.zero == "none":
            step = 2 / (self.code_count - 1)
            largest = torch.maximum(low.abs(), high.abs())
            scale = largest * step if shrink is None else shrunk(largest, step * shrink)
            return {"scale": torch.where(constant, high.abs(), scale)}
        shared = not isinstance(self.scales, SingleScale)
        if self.zero == "integer" or shared:
            low, high = low.clamp(max=0), high.clamp(min=0)
        low, high = shrunk(low, shrink), shrunk(high, shrink)
        # GPUs multiply by the inverse of a number, so it comes as a tensor: all devices then find the same scale.
        scale = (high - low) / torch.full_like(high, self.code_count - 1)
        # A group far from zero keeps a step that its stored zero can resolve.
        scale = torch.maximum(scale, torch.maximum(low.abs(), high.abs()) * finest_step(self.scales.dtype))
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = torch.where(scale == 0, torch.full_like(scale, middle), -low / safe)
        if not shared:
            scale = torch.where(constant, torch.maximum(blocks.amin(-1).abs(), blocks.amax(-1).abs()), scale)
            zero = torch.where(constant, (blocks.amax(-1) < 0).float(), zero)
        if self.zero == "integer":
            zero = zero.round().clamp_(0, self.code_count - 1)
        return {"scale": scale, "zero_point": zero}

    def round(self, params: Params) -> Params:
        if self.zero != "integer":
            return self.scales.store(params["scale"], params.get("zero_point"))
        stored = self.scales.store(params["scale"], None)
        return {**stored, "zero_point": params["zero_point"].to(torch.uint8)}

    def load(self, params: Params) -> Numbers:
        scale, zero = self.scales.load(params)
        if self.zero == "integer":
            zero = params["zero_point"].float()
        elif zero is None:
            zero = torch.full_like(scale, self.code_count // 2)
        return {"scale": scale.unsqueeze(-1), "zero": zero.unsqueeze(-1)}

    def encode_loaded(self, blocks: Tensor, numbers: Numbers) -> Tensor:
        scale = numbers["scale"]
        steps = torch.where(scale == 0, 0.0, blocks / scale)
        return (steps + numbers["zero"]).round_().clamp_(0, self.code_count - 1).to(torch.uint8)

    def decode_loaded(self, codes: Tensor, numbers: Numbers) -> Tensor:
        return (codes.to(torch.float32) - numbers["zero"]) * numbers["scale"]

    def even(self, params: Params) -> tuple[Tensor, Tensor]:
        numbers = self.load(params)
        return numbers["scale"][..., 0].T.contiguous(), numbers["zero"][..., 0].T.contiguous()

    def layout(self, rows: int, columns: int) -> Layout:
        groups = self.groups(columns)
        layout = self.scales.layout(rows, groups, self.zero == "float")
        if self.zero == "integer":
            words = packing.words(rows * groups)
            layout["zero_point"] = TensorLayout(torch.int32, (words, self.code_bits), "scales")
        return layout

    def pack_params(self, params: Params) -> Params:
        if self.zero != "integer":
            return params
        return {**params, "zero_point": packing.pack_bits(params["zero_point"].flatten(), self.code_bits)}


class IntegerGrid(_Affine):
    """``2 ** num_bits`` evenly spaced values."""

    type: Literal["integer"] = "integer"
    num_bits: int = Field(4, ge=1, le=8)

    def model_post_init(self, context: object) -> None:
        if self.num_bits == 1 and self.zero == "none":
            raise ValueError("one symmetric bit cannot hold both signs; use the 'binary' grid or a zero point")

    @property
    def code_count(self) -> int:
        return 1 << self.num_bits


class LevelGrid(_Affine):
    """Three (ternary) or five evenly spaced values, packed 5 to a byte or 27 to 64 bits."""

    type: Literal["level"] = "level"
    levels: Literal[3, 5] = 3

    @property
    def code_count(self) -> int:
        return self.levels

    def propose(self, blocks: Tensor, importance: Tensor | None, shrink: Tensor | None = None) -> Params:
        if self.levels == 3 and self.zero == "none":
            return {"scale": shrunk(_best_ternary_scale(blocks, importance), shrink)}
        return super().propose(blocks, importance, shrink)


def _best_ternary_scale(blocks: Tensor, importance: Tensor | None) -> Tensor:
    """The exact least-squares scale of ``{-s, 0, s}``: keep the k largest magnitudes that maximise (sum)^2 / mass.

    (Ternary Weight Networks, Li and Liu 2016, equation 4, solved over all k instead of by its approximation.)
    """
    magnitude, order = blocks.abs().sort(dim=-1, descending=True)
    mass = torch.ones_like(magnitude) if importance is None else importance.gather(-1, order)
    total, weight = (magnitude * mass).cumsum(-1), mass.cumsum(-1)
    safe = weight.clamp(min=torch.finfo(torch.float32).tiny)
    best = (total.square() / safe).argmax(-1, keepdim=True)
    return (total / safe).gather(-1, best).squeeze(-1)
