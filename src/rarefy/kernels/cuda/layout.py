"""Execution layouts of ``linear.cu`` in terms of tensors, and back. Nothing is lost either way; any device.

A warp takes 16 rows (a tile) and ``step`` columns at once. Lane ``4 g + t`` holds, for each block of 16 columns, the
codes of rows ``g`` and ``g + 8`` in four columns, as four pairs: an operand of ``mma.m16n8k16`` whose columns are
reordered so that the lane's columns are neighbours (``span`` of them: a block's own four, or the eight of two blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rarefy.kernels.prepared import padded

Order = Literal["halves", "pairs", "nibbles"]
TILE, BLOCK = 16, 16
BITS = range(1, 9)


def step_of(bits: int) -> int:
    """Columns of a step: whole 16-byte loads of a lane, and 128 where that is possible."""
    return 256 if bits % 2 else 128


def pack_codes(codes: Tensor, bits: int, span: int, order: Order) -> Tensor:
    """Codes uint8 ``[rows, columns]`` as int32 ``[tiles, steps, loads, 32, 4]``.

    Pairs of a lane follow each other in a word, ``16 // bits`` of them, in one of three orders:

    * ``halves``: the first code of each in the lower half of the word, the second in the upper half;
    * ``pairs``: both in neighbouring bits, together an index;
    * ``nibbles`` (3 and 4 bits): a word is one block, row ``g`` in the lower half, a code in every four bits.

    Codes of one bit in halves have words of row ``g`` and of row ``g + 8`` in turn, 128 columns each: what tensor cores
    that multiply bits take as they are.
    Codes of 5, 6 and 7 bits are words of their low 4 bits, then of the next 2, then of the last one, each in halves.
    Three bits make 5 pairs a word and leave a bit of each half of three words (or two bits of each word) to a sixteenth
    pair; or, in nibbles, the highest bits of three words make a fourth.
    """
    step = step_of(bits)
    lanes = _lanes(padded(padded(codes, 0, TILE), 1, step), step, span)  # [tiles, steps, 32, pairs, 2]
    if bits == 1 and order == "halves":
        lanes = lanes.unflatten(3, (2, -1, 2)).transpose(4, 5).flatten(3, 5)
    if bits == 3:
        words = _words_of_three(lanes, order)
    else:
        parts = [_words((lanes >> low) & ((1 << width) - 1), width, order) for low, width in _planes(bits)]
        words = torch.cat(parts, -1)
    return words.unflatten(-1, (-1, 4)).transpose(2, 3).contiguous()


def unpack_codes(packed: Tensor, bits: int, span: int, order: Order, rows: int, columns: int) -> Tensor:
    """Inverse of ``pack_codes``: uint8 ``[rows, columns]``."""
    words = packed.transpose(2, 3).flatten(-2)
    tiles, steps = packed.shape[:2]
    step = step_of(bits)
    if bits == 3:
        lanes = _lanes_of_three(words, order)
    else:
        planes = _planes(bits)
        parts_of = words.split([step * width // 64 for _, width in planes], -1)
        lanes = torch.zeros(tiles, steps, 32, step // 4, 2, dtype=torch.uint8, device=packed.device)
        for (low, width), own in zip(planes, parts_of, strict=True):
            lanes |= _lanes_of(own, width, order) << low
    if bits == 1 and order == "halves":
        lanes = lanes.unflatten(3, (2, 2, -1)).transpose(4, 5).flatten(3, 5)
    parts = lanes.reshape(tiles, steps, 8, 4, *_inner(step, span), 2, 2, 2)  # t's own columns, q, h, f
    if span == 8:  # tiles, steps, g, t, p, e, q, h, f
        dense = parts.permute(0, 7, 2, 1, 4, 3, 5, 6, 8)
    else:  # tiles, steps, g, t, b, q, h, f
        dense = parts.permute(0, 6, 2, 1, 4, 3, 5, 7)
    return dense.reshape(tiles * TILE, steps * step)[:rows, :columns].contiguous()


PIECE, CHUNK = 16, 8  # columns of a piece, pieces of a chunk


def pack_kept(groups: Tensor, numbers: Sequence[Tensor], counts: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Kept groups, uint8 codes ``[groups, size]`` of 4 bits, ``counts [rows]`` of each row, as chunks of eight pieces
    of 16 columns: int32 ``[chunks, 4, 4]``, of lane ``t`` columns ``4 t`` to ``4 t + 3`` of each piece, two pieces to a
    word, the first codes of pairs in its lower half. Each row begins a chunk; zeros fill up its last. ``numbers
    [groups]``, scales and such, likewise ``[chunks, groups of a chunk]``. And where the chunks of rows begin."""
    of_chunk = CHUNK * PIECE // groups.shape[1]
    place, starts = _places_of_kept(counts, of_chunk)
    chunks = int(starts[-1])
    padded_codes = groups.new_zeros(chunks * of_chunk, groups.shape[1])
    padded_codes[place] = groups
    parts = padded_codes.reshape(chunks, 4, 2, 4, 2, 2).to(torch.int32)  # words, pieces, t, pairs, codes
    words = (parts << _shifts_of_pieces(groups.device)).sum((2, 4, 5), dtype=torch.int32).transpose(1, 2).contiguous()
    spread = [each.new_zeros(chunks * of_chunk).index_copy(0, place, each) for each in numbers]
    return words, [each.reshape(chunks, of_chunk) for each in spread], starts


def unpack_kept(words: Tensor, numbers: Sequence[Tensor], counts: Tensor, size: int) -> tuple[Tensor, list[Tensor]]:
    """Inverse of ``pack_kept``."""
    place, _ = _places_of_kept(counts, CHUNK * PIECE // size)
    parts = words.transpose(1, 2)[:, :, None, :, None, None] >> _shifts_of_pieces(words.device) & 15
    return parts.to(torch.uint8).reshape(-1, size)[place], [each.flatten()[place] for each in numbers]


def _places_of_kept(counts: Tensor, of_chunk: int) -> tuple[Tensor, Tensor]:
    """The place of each kept group among those of whole chunks, and where the chunks of each row begin."""
    chunks = (counts + of_chunk - 1) // of_chunk
    starts = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))
    row, number, _ = _places_in_rows(torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
    return starts[row] * of_chunk + number, starts


def _shifts_of_pieces(device: torch.device) -> Tensor:
    """Where a code lies in its word: ``[pieces, 1, pairs, codes]``."""
    two = torch.arange(2, dtype=torch.int32, device=device)
    return 8 * two[:, None, None, None] + 4 * two[:, None] + 16 * two


def pack_pairs(numbers: Tensor) -> Tensor:
    """Numbers of rows and groups ``[rows, groups]`` as ``[tiles, groups, 8, 2]``, rows ``g`` and ``g + 8`` together."""
    return padded(numbers, 0, TILE).unflatten(0, (-1, 2, 8)).permute(0, 3, 2, 1).contiguous()


def unpack_pairs(pairs: Tensor, rows: int) -> Tensor:
    """Inverse of ``pack_pairs``."""
    return pairs.permute(0, 3, 2, 1).flatten(0, 2)[:rows].contiguous()


def pack_tables(tables: Tensor) -> Tensor:
    """Tables of rows ``[rows, groups, entries]`` of 16-bit floats, 8 or 16 entries, as int32
    ``[tiles, groups, 8, 2, entries / 2]``: rows ``g`` and ``g + 8`` together, of each the low bytes and the high ones.
    """
    octets = padded(tables, 0, TILE).contiguous().view(torch.uint8).unflatten(-1, (-1, 2)).transpose(-1, -2)
    pairs = octets.unflatten(0, (-1, 2, 8)).permute(0, 3, 2, 1, 4, 5).flatten(-2).contiguous()
    return pairs.view(torch.int32)


def unpack_tables(packed: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Inverse of ``pack_tables``."""
    octets = packed.view(torch.uint8).unflatten(-1, (2, -1)).transpose(-1, -2)
    tables = octets.permute(0, 3, 2, 1, 4, 5).flatten(0, 2)[:rows].contiguous()
    return tables.flatten(-2).view(dtype)


def pair_table(table: Tensor) -> Tensor:
    """A table ``[entries]`` of 16-bit floats as that of two codes at once, int32 ``[entries ** 2]``."""
    low = table.view(torch.int16).to(torch.int32) & 0xFFFF
    return (low[None, :] | (low[:, None] << 16)).flatten().contiguous()


QUAD = 4  # entries of a row that lie beside those of the other rows of its tile
_OF_REST = 2048  # bytes that a tile which reads entries of a list may as well read instead of waiting for them


def quads_of(counts: Tensor) -> int:
    """How many quads a row is to have, for rows of so many entries ``[rows]``: those that take the least to read."""
    tiles = padded(counts.to(torch.int64), 0, TILE).reshape(-1, TILE)
    most = int(counts.max()) if counts.numel() else 0
    below = torch.bincount(counts.to(torch.int64), minlength=most + 1).cumsum(0)  # rows of up to so many entries
    longer = (counts.numel() - below).flip(0).cumsum(0).flip(0)  # entries beyond so many of their row
    waiting = len(tiles) - torch.bincount(tiles.amax(1), minlength=most + 1).cumsum(0)
    quads = torch.arange(-(-most // QUAD) + 1, device=counts.device)
    beyond = (quads * QUAD).clamp(max=most)
    nbytes = quads * QUAD * TILE * 4 * len(tiles) + longer[beyond] * 4 + waiting[beyond] * _OF_REST
    return int(nbytes.argmin())


def pack_entries(entries: Tensor, row_ptr: Tensor, quads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed sparse rows, int32 ``[n]`` and ``[rows + 1]``, as int32 ``[tiles, quads, 32, 2]``: lane ``4 g + t``
    has entry ``4 quad + t`` of rows ``g`` and ``g + 8``, zeros where a row has fewer; and what each row has beyond
    those, again in compressed sparse rows."""
    row, number, counts = _places_in_rows(row_ptr)
    rows, near = counts.numel(), number < QUAD * quads
    dense = entries.new_zeros(-(-rows // TILE) * TILE, QUAD * quads)
    dense[row[near], number[near]] = entries[near]
    packed = dense.reshape(-(-rows // TILE), 2, 8, quads, QUAD).permute(0, 3, 2, 4, 1).flatten(2, 3).contiguous()
    beyond = (counts - QUAD * quads).clamp(min=0).cumsum(0)
    return packed, entries[~near], torch.nn.functional.pad(beyond, (1, 0)).to(torch.int32)


def unpack_entries(packed: Tensor, rest: Tensor, row_ptr: Tensor) -> Tensor:
    """Inverse of ``pack_entries``: the entries, for the row pointers that were given."""
    row, number, _ = _places_in_rows(row_ptr)
    tiles, quads = packed.shape[:2]
    near = number < QUAD * quads
    dense = packed.reshape(tiles, quads, 8, QUAD, 2).permute(0, 4, 2, 1, 3).reshape(tiles * TILE, QUAD * quads)
    entries = packed.new_empty(row.numel())
    entries[near], entries[~near] = dense[row[near], number[near]], rest
    return entries


def _places_in_rows(row_ptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row of each entry, its number there, and how many each row has."""
    counts = row_ptr.diff().to(torch.int64)
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=row_ptr.device), counts)
    return row, torch.arange(row.numel(), device=row_ptr.device) - row_ptr[:-1].to(torch.int64)[row], counts


def _inner(step: int, span: int) -> tuple[int, ...]:
    return (step // 32, 2) if span == 8 else (step // BLOCK,)


def _lanes(codes: Tensor, step: int, span: int) -> Tensor:
    """``[rows, columns]`` to ``[tiles, steps, 32, pairs, 2]``."""
    tiles, steps = codes.shape[0] // TILE, codes.shape[1] // step
    if span == 8:
        parts = codes.reshape(tiles, 2, 8, steps, step // 32, 4, 2, 2, 2)  # h, g, steps, p, t, e, q, f
        lanes = parts.permute(0, 3, 2, 5, 4, 6, 7, 1, 8)
    else:
        parts = codes.reshape(tiles, 2, 8, steps, step // BLOCK, 4, 2, 2)  # h, g, steps, b, t, q, f
        lanes = parts.permute(0, 3, 2, 5, 4, 6, 1, 7)
    return lanes.reshape(tiles, steps, 32, step // 4, 2)


def _planes(bits: int) -> list[tuple[int, int]]:
    """The first bit and the width of each part of a code that has words of its own."""
    if bits <= 4 or bits == 8:
        return [(0, bits)]
    return {5: [(0, 4), (4, 1)], 6: [(0, 4), (4, 2)], 7: [(0, 4), (4, 2), (6, 1)]}[bits]


def _places(bits: int, order: Order, device: torch.device) -> Tensor:
    """Where the two codes of each pair of a word start, int32 ``[pairs, 2]``."""
    pairs = torch.arange({3: 4 if order == "nibbles" else 5}.get(bits, 16 // bits), dtype=torch.int32, device=device)
    second = torch.arange(2, dtype=torch.int32, device=device)
    if order == "nibbles":  # pair 2 q + h of row h: 16 h + 8 q
        return (pairs % 2 * 16 + pairs // 2 * 8)[:, None] + second * 4
    near = order == "pairs" or bits == 8
    return pairs[:, None] * 2 * bits + second * bits if near else pairs[:, None] * bits + second * 16


def _words(lanes: Tensor, bits: int, order: Order) -> Tensor:
    shifts = _places(bits, order, lanes.device)
    parts = lanes.unflatten(3, (-1, shifts.shape[0])).to(torch.int32) << shifts
    return parts.sum((-2, -1), dtype=torch.int32)


def _lanes_of(words: Tensor, bits: int, order: Order) -> Tensor:
    shifts = _places(bits, order, words.device)
    return ((words[..., None, None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(3, 4)


def _words_of_three(lanes: Tensor, order: Order) -> Tensor:
    parts = lanes.unflatten(3, (-1, 16)).to(torch.int32)  # sixteen pairs to three words
    shifts = _places(3, order, lanes.device)
    whole = 3 * shifts.shape[0]
    words = (parts[..., :whole, :].unflatten(-2, (3, -1)) << shifts).sum((-2, -1), dtype=torch.int32)
    rest = parts[..., whole:, :]
    if order == "nibbles":
        words |= _spare_bits(rest, shifts, lanes.device)
    elif order == "pairs":
        index = rest[..., 0, 0] | (rest[..., 0, 1] << 3)
        words |= ((index.unsqueeze(-1) >> 2 * _three(lanes.device)) & 3) << 30
    else:
        words |= _spare_bits(rest, _ends(lanes.device) - 3, lanes.device)
    return words.flatten(-2)


def _lanes_of_three(words: Tensor, order: Order) -> Tensor:
    threes = words.unflatten(-1, (-1, 3))
    shifts = _places(3, order, words.device)
    first = ((threes[..., None, None] >> shifts) & 7).flatten(-3, -2)
    number = _three(words.device)
    if order == "pairs":
        index = (((threes >> 30) & 3) << 2 * number).sum(-1, dtype=torch.int32)
        rest = torch.stack([index & 7, index >> 3], -1).unsqueeze(-2)
    else:
        places = (shifts if order == "nibbles" else _ends(words.device) - 3) + 3
        bits = (threes[..., None, None] >> places) & 1
        rest = (bits << number[:, None, None]).sum(-3, dtype=torch.int32)
    return torch.cat([first, rest], -2).flatten(3, 4).to(torch.uint8)


def _three(device: torch.device) -> Tensor:
    return torch.arange(3, dtype=torch.int32, device=device)


def _ends(device: torch.device) -> Tensor:
    """The last bits of a word's halves, ``[1, 2]``."""
    return torch.tensor([[15, 31]], dtype=torch.int32, device=device)


def _spare_bits(codes: Tensor, shifts: Tensor, device: torch.device) -> Tensor:
    """Bit ``n`` of each code in word ``n``, above the place of another code: ``[..., pairs, 2]`` to ``[..., 3]``."""
    bits = (codes.unsqueeze(-3) >> _three(device)[:, None, None]) & 1
    return (bits << (shifts + 3)).sum((-2, -1), dtype=torch.int32)
