"""Execution layouts in terms of tensors: 16 rows to a tile, and back. Nothing is lost either way.

The native library's own side of these layouts is written in csrc/rarefy.h and csrc/layout.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy import packing
from rarefy.kernels.cpu.library import _loaded, follow_threads
from rarefy.kernels.prepared import padded

TILE, UNIT, PANEL = 16, 32, 128
SLACK = 64  # bytes after lists that kernels read in whole registers


def tile_rows(parameters: Tensor) -> Tensor:
    """``[rows, groups, ...] -> [tiles, groups, ..., 16]``; rows beyond the last are zero."""
    return padded(parameters, 0, TILE).unflatten(0, (-1, TILE)).movedim(1, -1).contiguous()


def untile_rows(tiles: Tensor, rows: int) -> Tensor:
    """Inverse of ``tile_rows``."""
    return tiles.movedim(-1, 1).flatten(0, 1)[:rows].contiguous()


def pack_codes(stream: Tensor, columns: int) -> Tensor:
    """A bit stream ``int32 [rows, words, bits]`` as the tiles of CODES, uint8 ``[tiles, words, bits, 64]``."""
    rows, words, bits = stream.shape
    tiles = torch.empty(-(-rows // TILE), words, bits, 64, dtype=torch.uint8)
    follow_threads()
    _loaded().rarefy_pack_codes(stream.contiguous().data_ptr(), tiles.data_ptr(), rows, columns, bits)
    return tiles


def unpack_codes(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of ``pack_codes``."""
    _, words, bits, _ = tiles.shape
    stream = torch.empty(rows, words, bits, dtype=torch.int32)
    follow_threads()
    _loaded().rarefy_unpack_codes(tiles.data_ptr(), stream.data_ptr(), rows, columns, bits)
    return stream


def pack_row_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes ``uint8 [rows, columns]`` as the rows of TABLES, uint8 ``[tiles, panels, 16, 16 * bits]``.

    Lane ``l`` of 16 holds the codes of columns ``l``, ``16 + l``, ... ``112 + l`` of a panel, planes of 4, 2 and 1 bits
    apart.
    """
    panels = padded(padded(codes, 0, TILE), 1, PANEL).unflatten(1, (-1, 8, 16)).to(torch.int32)
    pieces, low = [], 0
    for width in _planes(bits):
        shifts = torch.arange(0, 8 * width, width, dtype=torch.int32)[:, None]
        lanes = (((panels >> low) & ((1 << width) - 1)) << shifts).sum(2, dtype=torch.int32)
        pieces.append(lanes.unsqueeze(-1).view(torch.uint8)[..., :width].flatten(2))
        low += width
    return torch.cat(pieces, -1).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def unpack_row_codes(tiles: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Inverse of ``pack_row_codes``."""
    octets = tiles.transpose(1, 2).flatten(0, 1)
    codes = torch.zeros(*octets.shape[:2], 8, 16, dtype=torch.int32)
    low = start = 0
    for width in _planes(bits):
        own = octets[..., start : start + 16 * width].unflatten(-1, (16, width)).to(torch.int32)
        lanes = (own << torch.arange(0, 8 * width, 8, dtype=torch.int32)).sum(-1, dtype=torch.int32).unsqueeze(2)
        shifts = torch.arange(0, 8 * width, width, dtype=torch.int32)[:, None]
        codes |= ((lanes >> shifts) & ((1 << width) - 1)) << low
        low, start = low + width, start + 16 * width
    return codes.flatten(1)[:rows, :columns].to(torch.uint8)


def quad_lanes(dense: Tensor) -> Tensor:
    """``[rows, columns] -> [tiles, quads, 64]``: lane ``4 * row + column`` of 16 rows x 4 columns."""
    whole = padded(padded(dense, 0, TILE), 1, UNIT)
    return whole.unflatten(1, (-1, 4)).unflatten(0, (-1, TILE)).transpose(1, 2).flatten(2)


def dense_of_quads(lanes: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of ``quad_lanes``."""
    return lanes.unflatten(2, (TILE, 4)).transpose(1, 2).flatten(0, 1).flatten(1)[:rows, :columns]


def pack_mask(flags: Tensor) -> Tensor:
    """Bool ``[..., n]`` as one word each, bit ``j`` for flag ``j``: int64 for 64 flags, int16 for 16."""
    kind = torch.int64 if flags.shape[-1] == 64 else torch.int16
    words = flags.contiguous().to(torch.uint8)
    return packing.pack_bitmap(words).contiguous().view(torch.uint8)[..., : flags.shape[-1] // 8].contiguous().view(
        kind
    ).squeeze(-1)


def unpack_mask(words: Tensor) -> Tensor:
    """Inverse of ``pack_mask``: bool ``[..., 64]`` or ``[..., 16]``."""
    return _bits(words.unsqueeze(-1).view(torch.uint8))


def pack_kept(codes: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The bytes or nibbles of KEPT for lanes ``[tiles, quads, 64]``, and the first byte of each tile, int64.

    Codes of more than 4 bits take a byte; others take a nibble, and a quad starts with a whole byte.
    """
    counts = mask.sum(-1)
    sizes = counts if bits > 4 else (counts + 1) // 2
    starts = _running(sizes.flatten())
    octets = torch.zeros(int(starts[-1]) + SLACK, dtype=torch.uint8)
    if bits > 4:
        octets[: int(starts[-1])] = codes[mask]
    else:
        place = (starts[:-1].reshape(counts.shape)[..., None] * 2 + mask.cumsum(-1) - 1)[mask]
        nibbles = torch.zeros(2 * octets.numel(), dtype=torch.uint8)
        nibbles[place] = codes[mask]
        octets = nibbles[0::2] | (nibbles[1::2] << 4)
    tiles = torch.cat([starts[:-1].reshape(counts.shape)[:, 0], starts[-1:]])
    return octets, tiles.contiguous()


def unpack_kept(octets: Tensor, mask: Tensor, bits: int) -> Tensor:
    """Inverse of ``pack_kept``: lanes uint8 ``[tiles, quads, 64]``, zero where nothing is kept."""
    lanes = torch.zeros(mask.shape, dtype=torch.uint8)
    counts = mask.sum(-1)
    if bits > 4:
        lanes[mask] = octets[: int(counts.sum())]
        return lanes
    starts = _running(((counts + 1) // 2).flatten())[:-1].reshape(counts.shape)
    place = (starts[..., None] * 2 + mask.cumsum(-1) - 1)[mask]
    nibbles = torch.stack([octets & 15, octets >> 4], -1).flatten()
    lanes[mask] = nibbles[place]
    return lanes


def pack_entries(entries: Tensor, row_ptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed sparse rows, int32 ``[kept]`` and ``[panels, rows + 1]``, as the slices of ENTRIES int32
    ``[slices, 16]``, what their lanes hold uint8 ``[panels * tiles, 48]``, and first slices int32 ``[tiles + 1]``."""
    panels, rows = row_ptr.shape[0], row_ptr.shape[1] - 1
    ends = torch.arange(-(-rows // TILE) + 1).mul(TILE).clamp(max=rows)
    counts = row_ptr[:, ends].diff().flatten()
    starts = _running((counts + TILE - 1) // TILE).to(torch.int32)
    slices = torch.empty(int(starts[-1]), TILE, dtype=torch.int32)
    lanes = torch.empty(len(counts), 48, dtype=torch.uint8)
    follow_threads()
    _loaded().rarefy_pack_entries(
        entries.data_ptr(), row_ptr.data_ptr(), starts.data_ptr(), rows, panels, slices.data_ptr(), lanes.data_ptr()
    )
    return slices, lanes, starts


def unpack_entries(slices: Tensor, lanes: Tensor, starts: Tensor, rows: int, kept: int) -> tuple[Tensor, Tensor]:
    """Inverse of ``pack_entries`` for rows whose columns rise."""
    panels = len(lanes) // -(-rows // TILE)
    entries, row_ptr = torch.empty(kept, dtype=torch.int32), torch.empty(panels, rows + 1, dtype=torch.int32)
    _loaded().rarefy_unpack_entries(
        slices.data_ptr(), lanes.data_ptr(), starts.data_ptr(), rows, panels, entries.data_ptr(), row_ptr.data_ptr()
    )
    return entries, row_ptr


def column_lanes(dense: Tensor) -> Tensor:
    """``[rows, columns] -> [tiles, columns up to a multiple of 32, 16]``."""
    return padded(padded(dense, 0, TILE), 1, UNIT).unflatten(0, (-1, TILE)).transpose(1, 2)


def dense_of_columns(lanes: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of ``column_lanes``."""
    return lanes.transpose(1, 2).flatten(0, 1)[:rows, :columns]


def tile_starts(mask: Tensor) -> Tensor:
    """The first kept entry of each tile of lanes ``[tiles, ...]``, int64 ``[tiles + 1]``."""
    return _running(mask.flatten(1).sum(1))


def with_slack(octets: Tensor) -> Tensor:
    """Bytes followed by some that kernels may read and nobody uses."""
    return torch.cat([octets, octets.new_zeros(SLACK)])


def _planes(bits: int) -> list[int]:
    return [width for width in (4, 2, 1) if bits & width]


def _running(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def _bits(octets: Tensor) -> Tensor:
    return ((octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2).bool()
