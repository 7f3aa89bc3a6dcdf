"""From stored tensors to dense float32 weights ``[rows, columns]``: one function per family of grids.

Parameters have one entry per row and group of ``group_size`` columns of the dense matrix (0 = the whole row), the
last group possibly short; under a group pattern they are stored for kept groups only. Arguments named as in
``kernels/ops.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy import packing
from rarefy.kernels.reference import tables
from rarefy.kernels.reference.patterns import kept_per_row, mask, scatter, scatter_groups


def decode_integer(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    second_order: Tensor | None,
    positions: Tensor | None,
    row_ptr: Tensor | None,
    pattern: str,
    block: list[int],
    packing_name: str,
    levels: int,
    group_size: int,
    tile: list[int],
    rows: int,
    columns: int,
) -> Tensor:
    """``scale * (code - zero)`` with ``levels`` codes; without a zero point the zero is ``levels // 2``.

    ``zero_point`` is float ``[rows, groups]`` or an int32 bit stream of integer codes. ``second_order`` (see
    ``group_scales``) makes scales, and zeros if it has four numbers a tile, two-level.
    """
    place = (pattern, block, positions, row_ptr, rows, columns)
    dense_codes = scatter(unpack_codes(codes, packing_name, levels, *place[:3], rows, columns), *place)
    scales, zeros = group_scales(scatter_groups(scale, *place), second_order, tile)
    if zero_point is not None:
        zeros = scatter_groups(_zeros(zero_point, _lead(scale, pattern), levels), *place).float()
    groups = _Groups(group_size, columns)
    values = groups.split(dense_codes.to(torch.float32))
    values = values.sub_(levels // 2 if zeros is None else groups.spread(zeros)).mul_(groups.spread(scales))
    return _masked(values.reshape(rows, columns), place)


def decode_float(
    codes: Tensor,
    scale: Tensor,
    second_order: Tensor | None,
    positions: Tensor | None,
    row_ptr: Tensor | None,
    pattern: str,
    block: list[int],
    packing_name: str,
    format: str,
    group_size: int,
    tile: list[int],
    rows: int,
    columns: int,
) -> Tensor:
    """``scale * table[code]``; a scale ``[rows, groups, 2]`` holds one for positive and one for negative values."""
    place = (pattern, block, positions, row_ptr, rows, columns)
    levels = 1 << tables.FORMATS[format]
    dense_codes = scatter(unpack_codes(codes, packing_name, levels, *place[:3], rows, columns), *place)
    values = tables.table(format, codes.device)[dense_codes.to(torch.int32)]
    groups = _Groups(group_size, columns)
    values = groups.split(values)
    scale = scatter_groups(scale, *place)
    if scale.dim() == 3 and second_order is None:
        positive, negative = scale.float().unbind(-1)
        scales = torch.where(values < 0, groups.spread(negative), groups.spread(positive))
    else:
        scales = groups.spread(group_scales(scale, second_order, tile)[0])
    return _masked((values * scales).reshape(rows, columns), place)


def decode_lut(
    codes: Tensor,
    lut: Tensor,
    positions: Tensor | None,
    row_ptr: Tensor | None,
    pattern: str,
    block: list[int],
    packing_name: str,
    num_bits: int,
    rows_per_lut: int,
    group_size: int,
    rows: int,
    columns: int,
) -> Tensor:
    """``lut[row // rows_per_lut, column // group_size, code]``; ``lut`` is ``[row groups, column groups, entries]``."""
    place = (pattern, block, positions, row_ptr, rows, columns)
    unpacked = unpack_codes(codes, packing_name, 1 << num_bits, *place[:3], rows, columns)
    dense_codes = scatter(unpacked, *place).to(torch.int64)
    row_group = torch.arange(rows, device=codes.device) // rows_per_lut
    column_group = torch.arange(columns, device=codes.device) // (group_size or max(columns, 1))
    first = (row_group[:, None] * lut.shape[1] + column_group[None, :]) * lut.shape[2]
    return _masked(lut.float().flatten()[first + dense_codes], place)


def decode_values(
    values: Tensor,
    positions: Tensor | None,
    row_ptr: Tensor | None,
    pattern: str,
    block: list[int],
    rows: int,
    columns: int,
) -> Tensor:
    """Plain floating-point values at the positions of a pattern."""
    return scatter(values.float(), pattern, block, positions, row_ptr, rows, columns)


def decode_csr(entries: Tensor, row_ptr: Tensor, half: bool, rows: int, columns: int) -> Tensor:
    """Compressed sparse rows of 32-bit entries, a panel per 65536 columns; ``row_ptr`` is int32 ``[panels, rows + 1]``.

    ``half`` says that values are float16, otherwise bfloat16.
    """
    values, column = packing.unpack_entries(entries, torch.float16 if half else torch.bfloat16)
    counts = row_ptr.diff(dim=1).flatten().to(torch.int64)
    line = torch.repeat_interleave(
        torch.arange(counts.numel(), device=entries.device), counts, output_size=int(counts.sum())
    )
    used = line.numel()
    dense = torch.zeros(rows, columns, device=entries.device)
    dense[line % rows, column[:used] + (line // rows << 16)] = values[:used].float()
    return dense


def unpack_codes(
    codes: Tensor,
    packing_name: str,
    levels: int,
    pattern: str,
    block: list[int],
    positions: Tensor | None,
    rows: int,
    columns: int,
) -> Tensor:
    """Unpack the stored codes into the kept shape of the pattern (see ``reference/patterns.py``), uint8."""
    per_word = packing.RADIX[levels][0] if packing_name == "radix" else packing.WORD
    if pattern == "bitmap":
        count = codes.shape[0] * per_word
    elif pattern in ("groups_csr", "groups_bitmap"):
        count = codes.shape[0] * per_word // block[0] * block[0]
    elif pattern == "groups":
        assert positions is not None
        count = positions.shape[1] * block[0]
    else:
        count = columns if pattern == "full" else kept_per_row(columns, *block)
    if packing_name == "radix":
        return packing.unpack_radix(codes, levels, count)
    num_bits = (levels - 1).bit_length()
    if packing_name == "planes":
        return packing.unpack_planes(codes, num_bits, count)
    return packing.unpack_bits(codes, num_bits, count)


def group_scales(scale: Tensor, second_order: Tensor | None, tile: list[int]) -> tuple[Tensor, Tensor | None]:
    """Scales, and zeros where they are two-level, as float32 ``[rows, groups]``.

    Two-level (SpQR's bilevel scales): ``scale`` is uint8 ``[rows, groups]`` = scale code + 16 * zero code, or
    ``[rows, groups, 2]`` with a byte each; ``second_order`` is float ``[row tiles, group tiles, 2 or 4]`` = (step and
    zero of the scales, step and zero of the zeros) per ``tile`` = [rows, groups]: scale = step * (code - zero).
    """
    if second_order is None:
        return scale.float(), None
    if scale.dim() == 3:
        scale_code, zero_code = scale[..., 0].float(), scale[..., 1].float()
    else:
        scale_code, zero_code = (scale & 15).float(), (scale >> 4).float()
    spread = spread_tiles(second_order, tile, *scale.shape[:2])
    scales = spread[..., 0] * (scale_code - spread[..., 1])
    zeros = spread[..., 2] * (zero_code - spread[..., 3]) if spread.shape[-1] == 4 else None
    return scales, zeros


def spread_tiles(second_order: Tensor, tile: list[int], rows: int, groups: int) -> Tensor:
    """Numbers of tiles ``[row tiles, group tiles, ...]`` at every row and group, float32 ``[rows, groups, ...]``."""
    row_tile = torch.arange(rows, device=second_order.device) // tile[0]
    group_tile = torch.arange(groups, device=second_order.device) // tile[1]
    return second_order.float()[row_tile[:, None], group_tile]


def _lead(scale: Tensor, pattern: str) -> torch.Size:
    """The shape of one number per stored group, without the bytes or signs that may end a scale's own shape."""
    return scale.shape[: 1 if pattern in ("groups_csr", "groups_bitmap") else 2]


def _zeros(zero_point: Tensor, lead: torch.Size, levels: int) -> Tensor:
    if zero_point.is_floating_point():
        return zero_point
    return packing.unpack_bits(zero_point, (levels - 1).bit_length(), lead.numel()).reshape(lead)


class _Groups:
    """Pairs ``[rows, columns]`` values with ``[rows, groups]`` parameters; copies neither where groups are even."""

    def __init__(self, group_size: int, columns: int):
        self.size, self.columns = min(group_size or columns, columns) or 1, columns
        self.even = columns % self.size == 0 and columns > 0

    def split(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.size)) if self.even else values

    def spread(self, parameters: Tensor) -> Tensor:
        if self.even:
            return parameters.unsqueeze(-1)
        return parameters.unsqueeze(-1).expand(-1, -1, self.size).flatten(1)[:, : self.columns]


def _masked(dense: Tensor, place: tuple[str, list[int], Tensor | None, Tensor | None, int, int]) -> Tensor:
    """Zero outside the pattern: a code of zero need not mean a value of zero."""
    pattern = place[0]
    return dense if pattern == "full" else torch.where(mask(*place), dense, 0.0)
