"""Values from a look-up table: per tensor, row, row group, or block of columns; binary by region is such a table."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy.formats.grids.base import Grid, Numbers, Params
from rarefy.formats.layout import FLOATS, FloatName, Layout, Size, TensorLayout

LLOYD_STEPS = 30
# Tables of up to CUT_COUNT values start from the best cuts between BINS bins.
BINS, CUT_COUNT = 64, 16
# Blocks and values handled at once, which bounds memory to a few hundred megabytes.
CHUNK_BLOCKS, CHUNK_VALUES = 2048, 1 << 22


class _Table(Grid):
    """``value = lut[row // rows_per_lut, column // group_size, code]``.

    Blocks are ``[row groups, column groups, members]``.
    """

    family: ClassVar[str] = "lut"
    searchable: ClassVar[bool] = False
    rows_per_lut: Size | None = 1  # None: one table for all rows
    dtype: FloatName = "float16"

    def split(self, weight: Tensor, fill: bool = True) -> Tensor:
        blocks = super().split(weight, fill)
        rows, groups, size = blocks.shape
        height = self.height(rows)
        missing = -rows % height
        if missing:
            tail = blocks[-1:].expand(missing, groups, size) if fill else blocks.new_zeros(missing, groups, size)
            blocks = torch.cat([blocks, tail])
        return blocks.unflatten(0, (-1, height)).transpose(1, 2).flatten(2)

    def join(self, blocks: Tensor, rows: int, columns: int) -> Tensor:
        size = self.size(columns)
        wide = blocks.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
        return wide.reshape(wide.shape[0], -1)[:rows, :columns]

    def height(self, rows: int) -> int:
        return min(self.rows_per_lut or rows, rows) or 1

    def round(self, params: Params) -> Params:
        return {"lut": params["lut"].to(FLOATS[self.dtype])}

    def load(self, params: Params) -> Numbers:
        values = params["lut"].float()
        table, order = values.sort(-1)
        return {"values": values, "middles": (table[..., 1:] + table[..., :-1]) / 2, "order": order}

    def encode_loaded(self, blocks: Tensor, numbers: Numbers) -> Tensor:
        nearest = torch.searchsorted(numbers["middles"].contiguous(), blocks.contiguous())
        return numbers["order"].gather(-1, nearest).to(torch.uint8)

    def decode_loaded(self, codes: Tensor, numbers: Numbers) -> Tensor:
        return numbers["values"].gather(-1, codes.to(torch.int64))

    def layout(self, rows: int, columns: int) -> Layout:
        shape = (-(-rows // self.height(rows)), self.groups(columns), self.code_count)
        return {"lut": TensorLayout(FLOATS[self.dtype], shape, "tables")}

    def _ragged(self, rows: int, columns: int) -> bool:
        return super()._ragged(rows, columns) or bool(rows % self.height(rows))


class LutGrid(_Table):
    """``2 ** num_bits`` free values, fitted by weighted k-means in one dimension."""

    type: Literal["lut"] = "lut"
    num_bits: int = Field(4, ge=1, le=8)

    @property
    def code_count(self) -> int:
        return 1 << self.num_bits

    def propose(self, blocks: Tensor, importance: Tensor | None, shrink: Tensor | None = None) -> Params:
        return {"lut": lloyd(blocks, importance, self.code_count)}


class BinaryGrid(_Table):
    """One bit of sign within each of 1 to 4 magnitude regions: ``mean_r + sign * scale_r`` per row and column block
    (BiLLM, Huang et al. 2024; three regions are STBLLM's trisection). A code is ``2 * region + (sign > 0)``.
    """

    type: Literal["binary"] = "binary"
    group_size: Size | None = 128
    regions: int = Field(1, ge=1, le=4)

    @property
    def code_count(self) -> int:
        return 2 * self.regions

    def propose(self, blocks: Tensor, importance: Tensor | None, shrink: Tensor | None = None) -> Params:
        """The best ``2 * regions`` values; a region is a pair of them, the innermost pair first."""
        inner = self.regions - 1
        order = [value for region in range(self.regions) for value in (inner - region, inner + 1 + region)]
        return {"lut": lloyd(blocks, importance, self.code_count)[..., order]}


def lloyd(blocks: Tensor, importance: Tensor | None, count: int, steps: int = LLOYD_STEPS) -> Tensor:
    """Weighted one-dimensional k-means of each block, centroids float32 ``[..., count]``, ascending.

    Values are sorted once and every step costs running sums at ``count`` boundaries. The start is the best of all ways
    to cut the sorted values between bins (up to 16 centroids), or the quantiles of (importance * density)^(1/3), the
    optimal point density of a scalar quantizer (Panter and Dite 1951). Fewer values than centroids are their own
    centroids, and an all-zero importance counts as equal importance.
    """
    flat = blocks.reshape(-1, blocks.shape[-1])
    at_once = max(1, min(CHUNK_BLOCKS, CHUNK_VALUES // blocks.shape[-1]))
    masses = None if importance is None else importance.reshape(flat.shape).split(at_once)
    pieces = [
        _lloyd(piece, None if masses is None else masses[index], count, steps)
        for index, piece in enumerate(flat.split(at_once))
    ]
    return torch.cat(pieces).reshape(*blocks.shape[:-1], count)


def _lloyd(blocks: Tensor, importance: Tensor | None, count: int, steps: int) -> Tensor:
    """``lloyd`` of ``blocks [blocks, n]``."""
    values, order = blocks.contiguous().sort(-1)
    mass = torch.ones_like(values) if importance is None else importance.gather(-1, order)
    mass = torch.where(mass.sum(-1, keepdim=True) > 0, mass, torch.ones_like(mass)).double()
    missing = count - values.shape[-1]
    if missing >= 0:
        first = values.gather(-1, (mass > 0).int().argmax(-1, keepdim=True))
        own = torch.where(mass > 0, values, first)
        return torch.cat([own, first.expand(*first.shape[:-1], missing)], -1).sort(-1).values
    sums = torch.stack([_running_sum(mass * values.double() ** power) for power in range(3)])
    centers = _best_cuts(values, sums, count) if count <= CUT_COUNT else _spread_points(values, sums[0], count)
    for _ in range(steps):
        moved = _means(sums, _edges(values, centers), centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers


def _running_sum(numbers: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... n of ``numbers [..., n]``, float64 ``[..., n + 1]``."""
    return torch.nn.functional.pad(numbers.double().cumsum(-1), (1, 0))


def _edges(values: Tensor, centers: Tensor) -> Tensor:
    """Where the members of each ascending centroid start and end among sorted values, int64 ``[..., count + 1]``."""
    inner = torch.searchsorted(values, (centers[..., 1:] + centers[..., :-1]) / 2)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=values.shape[-1])


def _means(sums: Tensor, edges: Tensor, previous: Tensor) -> Tensor:
    """The mean between neighbouring edges, float32; where there is no mass, the ``previous`` one."""
    mass, first = sums[:2].gather(-1, edges.expand(2, *edges.shape)).diff(dim=-1)
    return torch.where(mass > 0, first / mass.clamp(min=1e-300), previous.double()).float().sort(-1).values


def _best_cuts(values: Tensor, sums: Tensor, count: int) -> Tensor:
    """The means of the least squared error among all ways to cut sorted ``values [blocks, n]`` between bins.

    By dynamic programming over bins: every value if there are few, otherwise spread as centroids would be.
    """
    size = values.shape[-1]
    if size <= BINS:
        edges = torch.arange(size + 1, device=values.device).expand(values.shape[0], size + 1)
    else:
        edges = _edges(values, _spread_points(values, sums[0], BINS))
    moments = sums.gather(-1, edges.expand(3, *edges.shape))
    mass, first, second = moments.unsqueeze(-2) - moments.unsqueeze(-1)  # of bins from the row's to the column's edge
    cost = (second - first.square() / mass.clamp(min=1e-300)).clamp_(min=0).float()
    cost.masked_fill_(torch.ones(cost.shape[-2:], dtype=torch.bool, device=cost.device).tril(-1), torch.inf)
    lowest, cuts = cost[:, 0], [torch.full_like(edges[:, :1], edges.shape[-1] - 1)]
    origins = []
    for _ in range(count - 1):
        lowest, origin = (lowest.unsqueeze(-1) + cost).min(-2)
        origins.append(origin)
    for origin in reversed(origins):
        cuts.append(origin.gather(-1, cuts[-1]))
    cuts.append(torch.zeros_like(cuts[-1]))
    overall = (sums[1, :, -1:] / sums[0, :, -1:]).expand(-1, count)
    return _means(sums, edges.gather(-1, torch.cat(cuts[::-1], -1)), overall)


def _spread_points(values: Tensor, weight_sum: Tensor, count: int) -> Tensor:
    """Quantiles of (mass density)^(1/3) of sorted ``values [..., n]``, from the spacing of 64 bins of equal mass.

    ``weight_sum [..., n + 1]`` is the running sum of mass; values without mass have no say.
    """
    bins = min(64, values.shape[-1])
    wanted = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=values.device) * weight_sum[..., -1:]
    sums = weight_sum[..., 1:].contiguous()
    # The first value up to which the mass is as wanted, and not before the first value that has any.
    edge = torch.searchsorted(sums, wanted.contiguous())
    first = torch.searchsorted(sums, torch.zeros_like(wanted[..., :1]), right=True)
    edges = values.gather(-1, torch.maximum(edge, first).clamp(max=values.shape[-1] - 1))
    # density ~ 1 / width within a bin of equal mass, so density^(1/3) * width = width^(2/3).
    share = torch.nn.functional.pad(edges.diff(dim=-1).clamp(min=0).pow(2 / 3).cumsum(-1), (1, 0))
    wanted = (torch.arange(count, device=values.device) + 0.5) / count * share[..., -1:]
    right = torch.searchsorted(share, wanted.contiguous()).clamp(1, bins)
    low, high = share.gather(-1, right - 1), share.gather(-1, right)
    part = torch.where(high > low, (wanted - low) / (high - low), 0.0)
    left = edges.gather(-1, right - 1)
    return left + part * (edges.gather(-1, right) - left)
