"""Values from a look-up table: per tensor, row, row group, or block of columns; binary by region is such a table."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy.formats.grids.base import Grid, Params
from rarefy.formats.layout import FLOATS, FloatName, Layout, Size, TensorLayout
from rarefy.formats.scales import store_floats

LLOYD_STEPS = 30


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
        """Rows that share a table."""
        return min(self.rows_per_lut or rows, rows) or 1

    def round(self, params: Params) -> Params:
        return {"lut": store_floats(params["lut"], FLOATS[self.dtype], "table entry")}

    def encode_blocks(self, blocks: Tensor, params: Params) -> Tensor:
        table, order = params["lut"].float().sort(-1)
        middles = (table[..., 1:] + table[..., :-1]) / 2
        nearest = torch.searchsorted(middles.contiguous(), blocks.contiguous())
        return order.gather(-1, nearest).to(torch.uint8)

    def decode_blocks(self, codes: Tensor, params: Params) -> Tensor:
        return params["lut"].float().gather(-1, codes.to(torch.int64))

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

    def propose(self, blocks: Tensor, importance: Tensor | None, shrink: float = 1.0) -> Params:
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

    def propose(self, blocks: Tensor, importance: Tensor | None, shrink: float = 1.0) -> Params:
        """Regions are magnitude quantiles of the block at first, then nearest points and least squares in turn."""
        mass = torch.ones_like(blocks) if importance is None else importance
        order = blocks.abs().argsort(-1)
        below = _running_sum(mass.gather(-1, order))
        share = (below[..., :-1] * self.regions / below[..., -1:]).long().clamp(max=self.regions - 1)
        code = 2 * torch.empty_like(share).scatter_(-1, order, share) + (blocks >= 0)
        table = _region_means(blocks, mass, code, self.code_count)
        for _ in range(LLOYD_STEPS):
            table = _region_means(blocks, mass, self.encode_blocks(blocks, {"lut": table}), self.code_count, table)
        return {"lut": table}


def lloyd(blocks: Tensor, importance: Tensor | None, count: int, steps: int = LLOYD_STEPS) -> Tensor:
    """Weighted one-dimensional k-means of each block, centroids float32 ``[..., count]``, ascending.

    Values are sorted once and every step costs running sums at ``count`` boundaries. The start is the quantiles of
    (importance * density)^(1/3), the optimal point density of a scalar quantizer (Panter and Dite 1951), taken from
    sorted spacing. Every other step first moves a centroid from where it is missed least to where it helps most.
    Fewer values than centroids are their own centroids, and an all-zero importance counts as equal importance.
    """
    values, order = blocks.contiguous().sort(-1)
    if values.shape[-1] <= count:
        return torch.nn.functional.pad(values, (0, count - values.shape[-1]), mode="replicate")
    mass = torch.ones_like(values) if importance is None else importance.gather(-1, order)
    mass = torch.where(mass.sum(-1, keepdim=True) > 0, mass, torch.ones_like(mass)).double()
    sums = torch.stack([_running_sum(mass * values.double() ** power) for power in range(3)])
    centers = _starting_points(values, sums[0], count)
    edges = _edges(values, centers)
    for step in range(steps):
        moved = _means(sums, edges, centers)
        if step % 2:
            moved = _relocate(values, sums, edges, moved)
        if torch.equal(moved, centers):
            break
        centers, edges = moved, _edges(values, moved)
    return centers


def _edges(values: Tensor, centers: Tensor) -> Tensor:
    """Where the members of each ascending centroid start and end among sorted values, int64 ``[..., count + 1]``."""
    inner = torch.searchsorted(values, (centers[..., 1:] + centers[..., :-1]) / 2)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=values.shape[-1])


def _sums_between(sums: Tensor, edges: Tensor) -> Tensor:
    """Mass, first and second moment between neighbouring edges, float64 ``[3, ..., edges - 1]``."""
    return sums.gather(-1, edges.expand(3, *edges.shape)).diff(dim=-1)


def _means(sums: Tensor, edges: Tensor, previous: Tensor) -> Tensor:
    """The mean between neighbouring edges, float32; where there is no mass, the ``previous`` one."""
    mass, first, _ = _sums_between(sums, edges)
    return torch.where(mass > 0, first / mass.clamp(min=1e-300), previous.double()).float().sort(-1).values


def _cost(moments: Tensor) -> Tensor:
    """The squared error of values of these moments around their mean."""
    mass, first, second = moments
    return (second - first.square() / mass.clamp(min=1e-300)).clamp(min=0)


def _relocate(values: Tensor, sums: Tensor, edges: Tensor, centers: Tensor) -> Tensor:
    """Merge two neighbours and split another centroid's members at their mean, wherever that lowers the error.

    Lloyd's steps alone never move a centroid across another, nor one without members.
    """
    count = centers.shape[-1]
    if count < 3:
        return centers
    moments = _sums_between(sums, edges)
    costs = _cost(moments)
    joined = moments[..., 1:] + moments[..., :-1]
    loss, pair = (_cost(joined) - costs[..., 1:] - costs[..., :-1]).min(-1, keepdim=True)
    middle = torch.searchsorted(values, centers).clamp(edges[..., :-1], edges[..., 1:])
    lower = _sums_between(sums, torch.stack([edges[..., :-1], middle], -1).flatten(-2))[..., ::2]
    upper = moments - lower
    gains = costs - _cost(lower) - _cost(upper)
    gain, split = gains.scatter(-1, torch.cat([pair, pair + 1], -1), -1.0).max(-1, keepdim=True)

    def mean_at(sums_of: Tensor, index: Tensor) -> Tensor:
        mass, first, _ = sums_of.gather(-1, index.expand(3, *index.shape))
        return (first / mass.clamp(min=1e-300)).float()

    one = torch.where(joined[0].gather(-1, pair) > 0, mean_at(joined, pair), centers.gather(-1, pair))
    changed = centers.scatter(-1, pair, one).scatter(-1, split, mean_at(lower, split))
    changed = changed.scatter(-1, pair + 1, mean_at(upper, split))
    # A gain must stand out from the rounding of the second moments.
    return torch.where(gain > loss + 1e-9 * costs.sum(-1, keepdim=True), changed, centers).sort(-1).values


def _running_sum(numbers: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... n of ``numbers [..., n]``, float64 ``[..., n + 1]``."""
    return torch.nn.functional.pad(numbers.double().cumsum(-1), (1, 0))


def _starting_points(values: Tensor, weight_sum: Tensor, count: int) -> Tensor:
    """Quantiles of (mass density)^(1/3) of sorted ``values [..., n]``, from the spacing of 64 bins of equal mass.

    ``weight_sum [..., n + 1]`` is the running sum of mass; values without mass have no say.
    """
    bins = min(64, values.shape[-1])
    wanted = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=values.device) * weight_sum[..., -1:]
    # The first value with mass up to each wanted mass; the smallest such value stands for none.
    edge = torch.searchsorted(weight_sum[..., 1:].contiguous(), wanted.contiguous())
    first = torch.searchsorted(weight_sum[..., 1:].contiguous(), torch.zeros_like(wanted[..., :1]), right=True)
    edges = values.gather(-1, torch.maximum(edge, first).clamp(max=values.shape[-1] - 1))
    # density ~ 1 / width within a bin of equal mass, so density^(1/3) * width = width^(2/3).
    share = torch.nn.functional.pad(edges.diff(dim=-1).clamp(min=0).pow(2 / 3).cumsum(-1), (1, 0))
    wanted = (torch.arange(count, device=values.device) + 0.5) / count * share[..., -1:]
    right = torch.searchsorted(share, wanted.contiguous()).clamp(1, bins)
    low, high = share.gather(-1, right - 1), share.gather(-1, right)
    part = torch.where(high > low, (wanted - low) / (high - low), 0.0)
    left = edges.gather(-1, right - 1)
    return left + part * (edges.gather(-1, right) - left)


def _region_means(blocks: Tensor, mass: Tensor, codes: Tensor, count: int, previous: Tensor | None = None) -> Tensor:
    """The weighted mean of the members of each code ``[..., count]``; an empty code keeps its ``previous`` value."""
    index = codes.to(torch.int64)
    shape = (*blocks.shape[:-1], count)
    weight = blocks.new_zeros(shape).scatter_add_(-1, index, mass)
    total = blocks.new_zeros(shape).scatter_add_(-1, index, mass * blocks)
    mean = total / weight.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(weight > 0, mean, torch.zeros_like(mean) if previous is None else previous)
