"""Stored tensors of one op family (``kernels/ops.py``) in an execution layout, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rarefy import packing
from rarefy.kernels import prepared
from rarefy.kernels.cpu import tiles
from rarefy.kernels.cpu.memory import HUGE, gather_
from rarefy.kernels.prepared import Arguments, NotCovered, filled, plain
from rarefy.kernels.reference import decode, patterns, tables

# Kinds, layouts and types of csrc/rarefy.h.
CODES, TABLES, KEPT, VALUES, ENTRIES, GROUPS = range(6)
UNIT_SCALE, SINGLE, SIGNED, NIBBLES, OCTETS, PAIRS = range(6)
NONE, F32, F16, BF16, U8 = range(5)
TYPES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.uint8: U8}
SLOTS = ("codes", "scale", "zero_point", "second_order", "table", "positions", "pointers")
NUMBERS = (
    "kind", "bits", "scale_layout", "scale_type", "zero_type", "second_type", "second_numbers", "entries",
    "rows", "columns", "group_size", "second_rows", "second_groups",
)  # fmt: skip
LARGEST_GROUP = 256  # columns of a group of GROUPS
PANEL = 65536  # columns that 16 bits tell apart


@dataclass
class Prepared(prepared.Prepared):
    """One term for the native library."""

    SLOTS: ClassVar[tuple[str, ...]] = SLOTS
    NUMBERS: ClassVar[tuple[str, ...]] = NUMBERS

    packed: tuple[tuple[tuple[int, int], ...], bytes] | None = None  # for the library, and where the tensors then were

    @property
    def multiplies_bytes(self) -> bool:
        small = "table" not in self.tensors or self.numbers["bits"] in (3, 4)
        return self.numbers["kind"] in (CODES, KEPT) and small


def prepare(family: str, arguments: Arguments, multiplier: float = 1.0) -> Prepared:
    """The execution layout of ``arguments`` of ``rarefy::linear_<family>`` (without ``x``), all on the CPU.

    Raises NotCovered, saying why, for what no native kernel reads. Verified: ``canonical()`` gives back equal tensors.
    """
    made = _PREPARE[family](arguments)
    made.multiplier = multiplier
    made.verify(arguments)
    if made.bytes() >= HUGE:
        gather_([made])
    return made


def _numbers(kind: int, bits: int, rows: int, columns: int, group_size: int = 0, **others: int) -> dict[str, int]:
    found = dict.fromkeys(NUMBERS, 0)
    if rows < 1 or columns < 1:
        raise NotCovered("an empty weight")
    group = min(group_size or columns, columns)
    found.update(kind=kind, bits=bits, rows=rows, columns=columns, group_size=group, **others)
    return found


# ---- Codes, dense or under a mask.


def _stream(codes: Tensor, name: str, bits: int, levels: int, columns: int) -> Tensor:
    """Canonical codes of a full pattern as a bit stream of ``bits``."""
    if name == "radix":
        return packing.pack_bits(packing.unpack_radix(codes, levels, columns), bits)
    if name == "planes":
        return packing.pack_bits(packing.unpack_planes(codes, bits, columns), bits)
    return codes


def _unstream(stream: Tensor, name: str, bits: int, levels: int, columns: int) -> Tensor:
    if name == "bitstream":
        return stream
    codes = packing.unpack_bits(stream, bits, columns)
    return packing.pack_radix(codes, levels) if name == "radix" else packing.pack_planes(codes, bits)


def _put_codes(
    codes: Tensor, place: tuple[Any, ...], name: str, levels: int
) -> tuple[dict[str, Tensor], int, int]:
    """Tensors of the codes, their kind and bits. ``place``: pattern, block, positions, row_ptr, rows, columns."""
    pattern, block, positions, _, rows, columns = place
    bits = max(1, (levels - 1).bit_length())
    if pattern == "full":
        return {"codes": tiles.pack_codes(_stream(codes, name, bits, levels, columns), columns)}, CODES, bits
    mask = patterns.mask(*place)
    dense = patterns.scatter(decode.unpack_codes(codes, name, levels, pattern, block, positions, rows, columns), *place)
    lanes = tiles.quad_lanes(mask)
    octets, starts = tiles.pack_kept(tiles.quad_lanes(dense), lanes, bits)
    return {"codes": octets, "positions": tiles.pack_mask(lanes), "pointers": starts}, KEPT, bits


def _take_codes(made: Prepared, pattern: str, block: list[int], name: str, levels: int) -> tuple[Tensor, Tensor | None]:
    """Canonical codes and positions."""
    rows, columns, bits = made.rows, made.columns, made.numbers["bits"]
    if made.numbers["kind"] == CODES:
        stream = tiles.unpack_codes(made.tensors["codes"], rows, columns)
        return _unstream(stream, name, bits, levels, columns), None
    lanes = tiles.unpack_mask(made.tensors["positions"])
    mask = tiles.dense_of_quads(lanes, rows, columns)
    dense = tiles.dense_of_quads(tiles.unpack_kept(made.tensors["codes"], lanes, bits), rows, columns)
    kept = dense[mask]
    if pattern != "bitmap":
        kept = kept.reshape(rows, -1)
    packed = packing.pack_radix(kept, levels) if name == "radix" else packing.pack_bits(kept, bits)
    return packed, _positions(mask, pattern, block)


def _positions(mask: Tensor, pattern: str, block: list[int]) -> Tensor:
    if pattern == "n_m_rank":
        return patterns.pack_ranks(mask, *block)
    return packing.pack_bitmap(mask)


def _put_scales(
    scale: Tensor, second_order: Tensor | None, tile: list[int]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors and numbers of single or two-level scales ``[rows, groups]`` (or with a last dimension of two)."""
    layout = SINGLE if scale.dim() == 2 else SIGNED
    numbers = {"scale_layout": layout, "scale_type": TYPES[scale.dtype]}
    made = {"scale": tiles.tile_rows(scale)}
    if second_order is None:
        return made, numbers
    rows, groups = tile
    count = second_order.shape[-1]
    numbers.update(
        scale_layout=NIBBLES if scale.dim() == 2 else OCTETS, second_type=TYPES[second_order.dtype],
        second_numbers=count, second_groups=groups,
    )  # fmt: skip
    if rows % tiles.TILE == 0:
        made["second_order"], numbers["second_rows"] = second_order, rows
    else:  # rows of a tile differ: every row gets its own
        spread = second_order.repeat_interleave(rows, dim=0)[: scale.shape[0]]
        made["second_order"], numbers["second_rows"] = tiles.tile_rows(spread), 1
    return made, numbers


def _take_scales(made: Prepared, tile: list[int]) -> tuple[Tensor, Tensor | None]:
    scale = tiles.untile_rows(made.tensors["scale"], made.rows)
    second = made.tensors.get("second_order")
    if second is not None and made.numbers["second_rows"] == 1:
        second = tiles.untile_rows(second, made.rows)[:: tile[0]].contiguous()
    return scale, second


def _put_zeros(zero_point: Tensor | None, scale: Tensor, levels: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    if zero_point is None:
        return {}, {}
    if not zero_point.is_floating_point():
        codes = packing.unpack_bits(zero_point, (levels - 1).bit_length(), scale.shape[0] * scale.shape[1])
        zero_point = codes.reshape(scale.shape[:2])
    return {"zero_point": tiles.tile_rows(zero_point)}, {"zero_type": TYPES[zero_point.dtype]}


def _take_zeros(made: Prepared, levels: int) -> Tensor | None:
    if "zero_point" not in made.tensors:
        return None
    zeros = tiles.untile_rows(made.tensors["zero_point"], made.rows)
    return zeros if zeros.is_floating_point() else packing.pack_bits(zeros.flatten(), (levels - 1).bit_length())


def _check_groups(group_size: int, columns: int, multiple: int) -> None:
    if 0 < group_size < columns and group_size % multiple:
        raise NotCovered(f"groups of {group_size} columns, which is no multiple of {multiple}")


def _integer(arguments: Arguments) -> Prepared:
    codes, scale, zero_point, second, positions, row_ptr, pattern, block, name, levels, size, tile, rows, columns = (
        arguments
    )
    if pattern in patterns.GROUP_PATTERNS:
        return _integer_groups(arguments)
    if pattern != "full":
        _check_groups(size, columns, tiles.UNIT)
        real = second is not None and second.shape[-1] == 4
        if real or (zero_point is not None and zero_point.is_floating_point()):
            raise NotCovered("real-valued zero points under a mask")
        if levels > 256 or name == "planes":
            raise NotCovered("this packing under a mask")
    _check_groups(size, columns, 4)
    place = (pattern, block, positions, row_ptr, rows, columns)
    tensors, kind, bits = _put_codes(codes, place, name, levels)
    numbers = _numbers(kind, bits, rows, columns, size)
    for made, more in (_put_scales(scale, second, tile), _put_zeros(zero_point, scale, levels)):
        tensors.update(made)
        numbers.update(more)

    return Prepared(tensors, numbers, _undo_integer, plain(arguments), zero=float(levels // 2))


def _undo_integer(made: Prepared) -> Arguments:
    pattern, block, name, levels, _, tile = made.plain[6:12]
    codes, positions = _take_codes(made, pattern, block, name, levels)
    scale, second = _take_scales(made, tile)
    given = {0: codes, 1: scale, 2: _take_zeros(made, levels), 3: second, 4: positions}
    return filled(made.plain, given)


def _float(arguments: Arguments) -> Prepared:
    codes, scale, second, positions, row_ptr, pattern, block, name, format, size, tile, rows, columns = arguments
    if pattern in patterns.GROUP_PATTERNS or (pattern != "full" and name == "planes"):
        raise NotCovered(f"'{format}' codes under pattern '{pattern}'")
    _check_groups(size, columns, 4 if pattern == "full" else tiles.UNIT)
    levels = 1 << tables.FORMATS[format]
    values = tables.table(format)
    place = (pattern, block, positions, row_ptr, rows, columns)
    tensors, kind, bits = _put_codes(codes, place, name, levels)
    made, more = _put_scales(scale, second, tile)
    tensors.update(made, table=values.clone())
    numbers = _numbers(kind, bits, rows, columns, size, **more)
    return Prepared(tensors, numbers, _undo_float, plain(arguments), zero=float((values == 0).nonzero()[0]))


def _undo_float(made: Prepared) -> Arguments:
    pattern, block, name, format, _, tile = made.plain[5:11]
    codes, positions = _take_codes(made, pattern, block, name, 1 << tables.FORMATS[format])
    scale, second = _take_scales(made, tile)
    return filled(made.plain, {0: codes, 1: scale, 2: second, 3: positions})


# ---- Tables.


def _lut(arguments: Arguments) -> Prepared:
    codes, lut, _, _, pattern, _, name, bits, rows_per_lut, size, rows, columns = arguments
    if pattern != "full":
        raise NotCovered(f"look-up tables under pattern '{pattern}'")
    groups, entries = lut.shape[1:]
    stream = _stream(codes, name, bits, 1 << bits, columns)
    others = plain(arguments)
    if lut.shape[0] == 1 and groups == 1:
        table = torch.zeros(1 << bits)
        table[:entries] = lut.flatten().float()
        tensors = {"codes": tiles.pack_codes(stream, columns), "table": table}
        numbers = _numbers(CODES, bits, rows, columns, scale_layout=UNIT_SCALE)
        return Prepared(tensors, numbers, _undo_lut, others, kept={"dtype": lut.new_empty(0, entries)})
    spread = lut.repeat_interleave(rows_per_lut, dim=0)[:rows]
    kept = {"dtype": lut.new_empty(0, entries)}
    if entries == 2 and bits == 1:
        _check_groups(size, columns, 4)
        tensors = {"codes": tiles.pack_codes(stream, columns), "scale": tiles.tile_rows(spread)}
        numbers = _numbers(
            CODES, bits, rows, columns, size, scale_layout=PAIRS, scale_type=TYPES[lut.dtype]
        )
        return Prepared(tensors, numbers, _undo_lut, others, kept=kept)
    if bits > 4:
        raise NotCovered(f"tables of {entries} entries for each row")
    _check_groups(size, columns, tiles.PANEL)
    tensors = {
        "codes": tiles.pack_row_codes(packing.unpack_bits(stream, bits, columns), bits),
        "table": tiles.tile_rows(spread).movedim(-1, 2).contiguous(),
    }
    numbers = _numbers(TABLES, bits, rows, columns, size, scale_type=TYPES[lut.dtype], entries=entries)
    return Prepared(tensors, numbers, _undo_lut, others, kept=kept)


def _undo_lut(made: Prepared) -> Arguments:
    name, bits, rows_per_lut = made.plain[6:9]
    dtype, entries = made.kept["dtype"].dtype, made.kept["dtype"].shape[1]
    if made.numbers["kind"] == TABLES:
        codes = tiles.unpack_row_codes(made.tensors["codes"], bits, made.rows, made.columns)
        stream = packing.pack_bits(codes, bits)
        lut = tiles.untile_rows(made.tensors["table"].movedim(2, -1), made.rows)[::rows_per_lut].contiguous()
    else:
        stream = tiles.unpack_codes(made.tensors["codes"], made.rows, made.columns)
        if "table" in made.tensors:
            lut = made.tensors["table"][:entries].to(dtype).reshape(1, 1, -1)
        else:
            lut = tiles.untile_rows(made.tensors["scale"], made.rows)[::rows_per_lut].contiguous()
    return filled(made.plain, {0: _unstream(stream, name, bits, 1 << bits, made.columns), 1: lut})


# ---- Lists.


def _values(arguments: Arguments) -> Prepared:
    values, positions, row_ptr, pattern, block, rows, columns = arguments
    if pattern not in ("bitmap", "n_m", "n_m_rank"):
        raise NotCovered(f"values under pattern '{pattern}'")
    place = (pattern, block, positions, row_ptr, rows, columns)
    lanes = tiles.column_lanes(patterns.mask(*place))
    kept = tiles.column_lanes(patterns.scatter(values, *place))[lanes]
    tensors = {
        "codes": tiles.with_slack(kept.contiguous().view(torch.uint8)),
        "positions": tiles.pack_mask(lanes),
        "pointers": tiles.tile_starts(lanes),
    }
    numbers = _numbers(VALUES, 8, rows, columns, scale_type=TYPES[values.dtype])
    return Prepared(tensors, numbers, _undo_values, plain(arguments), kept={"dtype": values.new_empty(0)})


def _undo_values(made: Prepared) -> Arguments:
    pattern, block = made.plain[3:5]
    lanes = tiles.unpack_mask(made.tensors["positions"])
    dtype = made.kept["dtype"].dtype
    spread = torch.zeros(lanes.shape, dtype=dtype)
    spread[lanes] = made.tensors["codes"][: -tiles.SLACK].view(dtype)
    mask = tiles.dense_of_columns(lanes, made.rows, made.columns)
    values = tiles.dense_of_columns(spread, made.rows, made.columns)[mask]
    values = values if pattern == "bitmap" else values.reshape(made.rows, -1)
    return filled(made.plain, {0: values, 1: _positions(mask, pattern, block)})


def _csr(arguments: Arguments) -> Prepared:
    entries, row_ptr, half, rows, columns = arguments
    entries, row_ptr = entries.contiguous(), row_ptr.contiguous()
    total = int(row_ptr[-1, -1])
    if bool((row_ptr.flatten().diff() < 0).any()) or int(row_ptr[0, 0]) != 0 or total > len(entries):
        raise NotCovered("row pointers that do not rise from 0 to the number of outliers")
    row_of = torch.repeat_interleave(torch.arange(row_ptr.shape[0] * rows), row_ptr.diff().flatten().to(torch.int64))
    places = row_of * PANEL + (entries[:total] & 0xFFFF)
    if bool((places.diff() <= 0).any()):
        raise NotCovered("outliers whose columns do not rise")
    slices, lanes, starts = tiles.pack_entries(entries, row_ptr)
    if len(starts) > 1 and int(starts.diff().max()) > 0xFFFF:
        raise NotCovered("more outliers in 16 rows than kernels count")
    tensors = {"codes": slices, "positions": lanes, "pointers": starts}
    numbers = _numbers(ENTRIES, 8, rows, columns, scale_type=F16 if half else BF16)
    # A stack fills its members up to the largest.
    return Prepared(tensors, numbers, _undo_csr, plain(arguments), kept={"filling": entries[total:].clone()})


def _undo_csr(made: Prepared) -> Arguments:
    slices, lanes, starts = (made.tensors[name] for name in ("codes", "positions", "pointers"))
    own = lanes.contiguous().view(torch.int16)[:, :16].to(torch.int64) & 0xFFFF
    borrowed = lanes[:, 32:] != torch.arange(16)
    kept = torch.where(borrowed, starts.diff()[:, None].to(torch.int64), own).sum()
    entries, row_ptr = tiles.unpack_entries(slices, lanes, starts, made.rows, int(kept))
    return filled(made.plain, {0: torch.cat([entries, made.kept["filling"]]), 1: row_ptr})


def _integer_groups(arguments: Arguments) -> Prepared:
    codes, scale, zero_point, second, positions, row_ptr, pattern, block, name, levels, size, _, rows, columns = (
        arguments
    )
    bits = (levels - 1).bit_length()
    size = min(size, columns)
    if second is not None or name != "bitstream" or size % 16 or size > LARGEST_GROUP or size != block[0]:
        raise NotCovered(f"kept groups of {size} columns with these scales")
    if pattern == "groups":
        count = positions.shape[1]
        flat = codes.contiguous().view(torch.uint8).reshape(rows, -1)[:, : count * size // 8 * bits].reshape(-1)
        pointers = torch.arange(rows + 1, dtype=torch.int32) * count
        ids = positions.reshape(-1, 2)
    else:
        chosen = patterns.group_mask(pattern, block, positions, row_ptr, rows, columns)
        pointers = torch.nn.functional.pad(chosen.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        total = int(pointers[-1])
        flat = codes.contiguous().view(torch.uint8).reshape(-1)[: total * size // 8 * bits]
        ids = packing.pack_uint16(chosen.nonzero()[:, 1])
    if int(pointers[-1]) != scale.numel():
        raise NotCovered("kept groups followed by the filling of a stack")
    numbers = _numbers(GROUPS, bits, rows, columns, size, scale_type=TYPES[scale.dtype])
    tensors = {
        "codes": tiles.with_slack(flat), "scale": scale.reshape(-1), "pointers": pointers,
        "positions": ids.contiguous(),
    }  # fmt: skip
    if zero_point is not None:
        if not zero_point.is_floating_point():
            zero_point = packing.unpack_bits(zero_point, bits, scale.numel())
        tensors["zero_point"], numbers["zero_type"] = zero_point.reshape(-1), TYPES[zero_point.dtype]
    return Prepared(tensors, numbers, _undo_groups, plain(arguments), zero=float(levels // 2))


def _undo_groups(made: Prepared) -> Arguments:
    pattern, block = made.plain[6:8]
    bits, rows = made.numbers["bits"], made.rows
    octets, scale, ids = made.tensors["codes"][: -tiles.SLACK], made.tensors["scale"], made.tensors["positions"]
    pointers: Tensor | None = made.tensors["pointers"]
    zeros = made.tensors.get("zero_point")
    if zeros is not None and not zeros.is_floating_point():
        zeros = packing.pack_bits(zeros, bits)
    lead = [rows, -1] if pattern == "groups" else [-1]
    codes = octets.reshape(rows, octets.numel() // rows) if pattern == "groups" else octets
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (4 * bits))).contiguous()
    codes = codes.flatten().view(torch.int32).reshape(*codes.shape[:-1], codes.shape[-1] // (4 * bits), bits)
    if zeros is not None and zeros.is_floating_point():
        zeros = zeros.reshape(lead)
    positions = ids.reshape(*lead, 2)
    if pattern == "groups_bitmap":
        assert pointers is not None
        groups = -(-made.columns // block[0])
        flags = torch.zeros(rows, groups, dtype=torch.bool)
        row_of = torch.repeat_interleave(torch.arange(rows), pointers.diff().to(torch.int64))
        flags[row_of, packing.unpack_uint16(ids)] = True
        positions = packing.pack_bitmap(flags)
    if pattern != "groups_csr":
        pointers = None
    return filled(made.plain, {0: codes, 1: scale.reshape(lead), 2: zeros, 4: positions, 5: pointers})


_PREPARE: dict[str, Callable[[Arguments], Prepared]] = {
    "integer": _integer, "float": _float, "lut": _lut, "values": _values, "csr": _csr,
}  # fmt: skip
