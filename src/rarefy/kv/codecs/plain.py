"""Leaves without calibration: 16-bit numbers as they are, and any grid of ``formats``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rarefy import packing
from rarefy.formats.grids import FloatGrid, Grid, IntegerGrid
from rarefy.formats.scales import SingleScale
from rarefy.kv.codec import Codec, Payload

Axis = Literal["channel", "token"]


class Exact(Codec):
    """Numbers in ``dtype``, which is the model's: nothing is lost."""

    def __init__(self, dtype: torch.dtype, tokens: int = 64):
        self.dtype, self.tokens = dtype, tokens

    def encode(self, x: Tensor) -> Payload:
        return {"exact": x.to(self.dtype)}

    def decode(self, payload: Payload) -> Tensor:
        return payload["exact"].float()


class Gridded(Codec):
    """A grid whose groups run over the tokens of a ``channel`` or over the channels of a ``token``.

    Stored per block: ``codes`` int32, a bit stream of ``[tokens, channels]`` (channels first for ``channel``), and the
    grid's parameters ``[vectors of the block, groups]``.
    """

    def __init__(self, grid: Grid, axis: Axis, tokens: int, channels: int):
        self.grid, self.axis, self.tokens, self.channels = grid, axis, tokens, channels

    @property
    def uniform(self) -> tuple[int, int] | None:
        """Bits of codes that are evenly spaced, and how many of a vector share a float16 scale and zero; None where
        codes are of another kind, as no kernel reads them."""
        match self.grid:
            case IntegerGrid(zero="float", scales=SingleScale(dtype="float16")) as grid:
                length = self.tokens if self.axis == "channel" else self.channels
                group = min(grid.group_size or length, length)
                return None if length % group else (grid.num_bits, group)
        return None

    def encode(self, x: Tensor) -> Payload:
        lead = x.shape[:3]
        vectors = x.transpose(-1, -2) if self.axis == "channel" else x
        flat = vectors.reshape(-1, vectors.shape[-1])
        params = self.grid.fit(flat)
        codes = self.grid.encode(flat, params).reshape(*lead, -1)
        stored = {name: tensor.reshape(*lead, vectors.shape[-2], -1) for name, tensor in params.items()}
        return {"codes": packing.pack_bits(codes, self.grid.code_bits), **stored}

    def decode(self, payload: Payload) -> Tensor:
        lead = payload["codes"].shape[:3]
        rows, columns = (self.channels, self.tokens) if self.axis == "channel" else (self.tokens, self.channels)
        codes = packing.unpack_bits(payload["codes"], self.grid.code_bits, rows * columns).reshape(-1, columns)
        params = {name: tensor.flatten(0, 3) for name, tensor in payload.items() if name != "codes"}
        values = self.grid.decode(codes, params).reshape(*lead, rows, columns)
        return values.transpose(-1, -2) if self.axis == "channel" else values


def is_float8(grid: FloatGrid, channels: int) -> bool:
    """Whether codes are numbers in E4M3 with one float16 scale for a token's vector."""
    plain = isinstance(grid.scales, SingleScale) and grid.scales.dtype == "float16" and not grid.two_scales
    return plain and grid.format == "fp8_e4m3" and (grid.group_size or channels) >= channels
