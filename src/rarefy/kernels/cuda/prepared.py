"""Stored tensors of one op family (``kernels/ops.py``) in the layouts of ``linear.cu``, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rarefy import packing
from rarefy.kernels import prepared
from rarefy.kernels.cuda import layout
from rarefy.kernels.cuda.code import Code
from rarefy.kernels.cuda.kept import SparseCode, is_two_of_four, kept_of, put_places, starts_of
from rarefy.kernels.prepared import Arguments, NotCovered, filled, plain
from rarefy.kernels.reference import patterns, tables

CODES, ENTRIES, GROUPS, MASKED = range(4)  # kinds
SINGLE, PAIRS, BILEVEL, LEVEL = range(4)  # what a scale is
SCALES = {PAIRS: "pairs", BILEVEL: "bilevel", LEVEL: "level"}
BYTES_OF_A_LANE = 64  # columns of a group whose bytes can stay row by row
NOT_A_NUMBER = 0x7F  # of E4M3, whatever the sign


@dataclass
class Prepared(prepared.Prepared):
    """One term for the kernels of this package. ``table``: float32, shared by all rows; ``pairs_half`` and
    ``pairs_bfloat16``: that of two codes at once, or tables of each row, rounded for activations of either type."""

    SLOTS: ClassVar[tuple[str, ...]] = (
        "codes", "scale", "zero_point", "second_order", "table", "pairs_half", "pairs_bfloat16", "entries", "row_ptr",
        "rest", "rest_ptr", "row_scale", "bitmap", "starts", "places", "bases",
    )  # fmt: skip
    NUMBERS: ClassVar[tuple[str, ...]] = (
        "kind", "bits", "group_size", "span", "scale_layout", "center", "half", "rows", "columns", "second_rows",
        "second_groups", "float8", "two_of_four",
    )  # fmt: skip

    @property
    def multiplies_bytes(self) -> bool:
        integers = self.numbers["kind"] == CODES and not self.numbers["float8"] and not _table_of(self.tensors)
        return "row_scale" in self.tensors or (integers and self.rows % 16 == 0 and self.columns % 32 == 0)


def code_of(tensors: dict[str, Tensor], numbers: dict[str, int]) -> Code:
    """What the kernel is told of a term of CODES."""
    scale, zero = tensors["scale"], tensors["zero_point"]
    named = SCALES.get(numbers["scale_layout"], scale.dtype if scale.numel() else None)
    return Code(
        bits=numbers["bits"], group=numbers["group_size"], span=numbers["span"], table=_table_of(tensors),
        scale=named, zero=zero.dtype if zero.numel() else None, center=numbers["center"],  # type: ignore[arg-type]
        float8=bool(numbers["float8"]), second_groups=numbers["second_groups"],
        ragged=numbers["columns"] % layout.step_of(numbers["bits"]) != 0,
    )  # fmt: skip


def sparse_code_of(tensors: dict[str, Tensor], numbers: dict[str, int]) -> SparseCode:
    """What the kernel is told of a term of GROUPS or MASKED."""
    zero, scale, bits = tensors["zero_point"], tensors["scale"], numbers["bits"]
    return SparseCode(
        bits, numbers["group_size"], scale.dtype if scale.numel() else None, zero.dtype if zero.numel() else None,
        numbers["center"], tensors["codes"].dtype if bits == 16 else None, numbers["kind"] == GROUPS,
        bool(numbers["two_of_four"]),
    )  # fmt: skip


def _table_of(tensors: Mapping[str, Tensor]) -> Literal["", "shared", "rows"]:
    pairs = tensors.get("pairs_half")
    if pairs is None or not pairs.numel():
        return ""
    return "shared" if pairs.dim() == 1 else "rows"


_ORDERS: dict[str, layout.Order] = {"": "halves", "shared": "pairs", "rows": "nibbles"}


def prepare(family: str, arguments: Arguments, multiplier: float = 1.0) -> Prepared:
    """The execution layout of ``arguments`` of ``rarefy::linear_<family>`` (without ``x``), all on one device.

    Raises NotCovered, saying why, for what no kernel reads. Verified: ``canonical()`` gives back equal tensors.
    """
    if family not in _PREPARE:
        raise NotCovered(f"the family '{family}'")
    made = _PREPARE[family](arguments)
    made.multiplier = multiplier
    made.verify(arguments)
    return made


def _numbers(kind: int, rows: int, columns: int, **others: int) -> dict[str, int]:
    if rows < 1 or columns < 1:
        raise NotCovered("an empty weight")
    found = dict.fromkeys(Prepared.NUMBERS, 0)
    found.update({"kind": kind, "rows": rows, "columns": columns, "second_rows": 1, "second_groups": 1, **others})
    return found


def _groups(group_size: int, bits: int, columns: int, plain_bytes: bool = False) -> dict[str, int]:
    """Numbers of groups that a step holds whole, or that hold whole steps; ``plain_bytes`` may stay as they are."""
    step = layout.step_of(bits)
    size = 0 if group_size >= columns else group_size
    if size and (size % step if size > step else size % layout.BLOCK or step % size):
        raise NotCovered(f"groups of {size} columns, where a step is {step}")
    if bits == 8 and plain_bytes and size % BYTES_OF_A_LANE == 0:
        return {"group_size": size, "span": 16}
    return {"group_size": size, "span": 4 if 0 < size < 32 else 8}


# ---- Codes.


def _bits(levels: int) -> int:
    return max(1, (levels - 1).bit_length())


def _put_codes(
    codes: Tensor, name: str, bits: int, levels: int, columns: int, span: int, order: layout.Order
) -> Tensor:
    if span == 16 and name == "bitstream":
        return codes.contiguous().view(torch.uint8).flatten(1)
    if name == "radix":
        dense = packing.unpack_radix(codes, levels, columns)
    elif name == "planes":
        dense = packing.unpack_planes(codes, bits, columns)
    else:
        dense = packing.unpack_bits(codes, bits, columns)
    return layout.pack_codes(dense, bits, span, order)


def _take_codes(made: Prepared, name: str, levels: int) -> Tensor:
    numbers = made.numbers
    bits, order = numbers["bits"], _ORDERS[_table_of(made.tensors)]
    if numbers["span"] == 16:
        return made.tensors["codes"].view(torch.int32).unflatten(1, (-1, 8))
    dense = layout.unpack_codes(made.tensors["codes"], bits, numbers["span"], order, made.rows, made.columns)
    if name == "radix":
        return packing.pack_radix(dense, levels)
    return packing.pack_planes(dense, bits) if name == "planes" else packing.pack_bits(dense, bits)


def _only_full(pattern: str) -> None:
    if pattern != "full":
        raise NotCovered(f"codes under pattern '{pattern}'")


def _put_scales(
    scale: Tensor, second: Tensor | None, tile: list[int]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    if scale.dim() != 2:
        raise NotCovered("a scale for each sign, or two bytes of scale and zero")
    made = {"scale": layout.pack_pairs(scale)}
    if second is None:
        return made, {"scale_layout": SINGLE}
    if tile[0] % layout.TILE or second.dtype != torch.float16:
        raise NotCovered(f"two-level scales in tiles of {tile[0]} rows, of {second.dtype}")
    four = torch.nn.functional.pad(second, (0, 4 - second.shape[-1])).contiguous()
    own = BILEVEL if second.shape[-1] == 4 else LEVEL
    return {**made, "second_order": four}, {
        "scale_layout": own, "second_rows": tile[0] // layout.TILE, "second_groups": tile[1],
    }  # fmt: skip


def _take_scales(made: Prepared) -> tuple[Tensor, Tensor | None]:
    second = made.tensors.get("second_order")
    if second is not None and made.numbers["scale_layout"] == LEVEL:
        second = second[..., :2].contiguous()
    return layout.unpack_pairs(made.tensors["scale"], made.rows), second


def _integer(arguments: Arguments) -> Prepared:
    codes, scale, zero_point, second, _, _, pattern, _, name, levels, size, tile, rows, columns = arguments
    if pattern in patterns.GROUP_PATTERNS:
        return _kept_groups(arguments)
    if pattern != "full":
        return _masked(arguments)
    _only_full(pattern)
    bits = _bits(levels)
    groups = _groups(size or columns, bits, columns, name == "bitstream")
    tensors, more = _put_scales(scale, second, tile)
    if zero_point is not None:
        if second is not None:
            raise NotCovered("two-level scales beside zero points of their own")
        if not zero_point.is_floating_point():
            zero_point = packing.unpack_bits(zero_point, bits, scale.numel()).reshape(scale.shape)
        tensors["zero_point"] = layout.pack_pairs(zero_point)
    tensors["codes"] = _put_codes(codes, name, bits, levels, columns, groups["span"], "halves")
    centered = zero_point is None and more["scale_layout"] != BILEVEL
    center = levels // 2 if centered else 0
    return Prepared(
        tensors, _numbers(CODES, rows, columns, bits=bits, center=center, **groups, **more), _undo_integer,
        plain(arguments), zero=float(center),
    )  # fmt: skip


def _undo_integer(made: Prepared) -> Arguments:
    name, levels = made.plain[8:10]
    scale, second = _take_scales(made)
    zeros = made.tensors.get("zero_point")
    if zeros is not None:
        zeros = layout.unpack_pairs(zeros, made.rows)
        if not zeros.is_floating_point():
            zeros = packing.pack_bits(zeros.flatten(), (levels - 1).bit_length())
    return filled(made.plain, {0: _take_codes(made, name, levels), 1: scale, 2: zeros, 3: second})


def _kept_groups(arguments: Arguments) -> Prepared:
    codes, scale, zero_point, second, positions, row_ptr, pattern, block, name, levels, size, _, rows, columns = (
        arguments
    )
    if second is not None or name != "bitstream" or levels != 16 or size != block[0] or columns % size:
        raise NotCovered(f"kept groups of {size} columns and {levels} levels")
    if size not in (16, 32, 64, 128):
        raise NotCovered(f"kept groups of {size} columns")
    chosen = patterns.group_mask(pattern, block, positions, row_ptr, rows, columns)
    counts = chosen.sum(1)
    total = int(counts.sum())
    if total != scale.numel():
        raise NotCovered("kept groups followed by the filling of a stack")
    lead = rows if pattern == "groups" else 1
    octets = codes.contiguous().view(torch.uint8).reshape(lead, -1)[:, : total // max(lead, 1) * size // 2]
    groups = torch.stack([octets & 15, octets >> 4], -1).reshape(total, size)
    zeros = zero_point
    if zeros is not None and not zeros.is_floating_point():
        zeros = packing.unpack_bits(zeros, 4, total)
    own = [chosen.nonzero()[:, 1], scale.flatten(), *([] if zeros is None else [zeros.flatten()])]
    words, (numbers_of_groups, *spread), row_ptr = layout.pack_kept(groups, own, counts)
    tensors = {"codes": words, "starts": torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)}
    tensors.update(zip(("scale", "zero_point"), spread, strict=False))
    tensors.update(put_places(numbers_of_groups, size, columns))
    if int(row_ptr.diff().amin()) < int(row_ptr.diff().amax()):
        tensors["row_ptr"] = row_ptr.to(torch.int32)
    center = levels // 2 if zero_point is None else 0
    numbers = _numbers(GROUPS, rows, columns, bits=4, group_size=size, center=center)
    return Prepared(tensors, numbers, _undo_groups, plain(arguments), zero=float(center))


def _undo_groups(made: Prepared) -> Arguments:
    pattern = made.plain[6]
    tensors, lead = made.tensors, made.rows if pattern == "groups" else 1
    chosen, groups, scale, zeros = kept_of(tensors, made.numbers)
    octets = (groups[:, ::2] | groups[:, 1::2] << 4).reshape(lead, -1)
    octets = torch.nn.functional.pad(octets, (0, -octets.shape[1] % 16)).contiguous()
    codes = octets.view(torch.int32).unflatten(1, (-1, 4))
    positions, row_ptr = packing.pack_bitmap(chosen), None
    if pattern != "groups_bitmap":
        positions = packing.pack_uint16(chosen.nonzero()[:, 1])
        row_ptr = tensors["starts"] if pattern == "groups_csr" else None
    if pattern == "groups":
        positions, scale = positions.unflatten(0, (lead, -1)), scale.unflatten(0, (lead, -1))
    else:
        codes = codes.squeeze(0)
    if zeros is not None:
        floating = zeros.is_floating_point()
        zeros = zeros.reshape(scale.shape) if floating else packing.pack_bits(zeros, 4)
    return filled(made.plain, {0: codes, 1: scale, 2: zeros, 4: positions, 5: row_ptr})


def _bitmap(positions: Tensor, pattern: str, block: list[int], rows: int, columns: int) -> Tensor:
    if pattern != "n_m_rank":
        return positions.contiguous()
    return packing.pack_bitmap(patterns.mask(pattern, block, positions, None, rows, columns))


def _positions(made: Prepared, pattern: str, block: list[int]) -> Tensor:
    bitmap = made.tensors["bitmap"]
    if pattern != "n_m_rank":
        return bitmap
    return patterns.pack_ranks(packing.unpack_bitmap(bitmap, made.columns), *block)


def _masked(arguments: Arguments) -> Prepared:
    codes, scale, zero_point, second, positions, _, pattern, block, name, levels, size, _, rows, columns = arguments
    bits = _bits(levels)
    if second is not None or name != "bitstream" or bits not in (1, 2, 4, 8) or scale.dim() != 2:
        raise NotCovered(f"codes of {bits} bits under pattern '{pattern}' with these scales or this packing")
    bitmap = _bitmap(positions, pattern, block, rows, columns)
    stride = codes.shape[1] * packing.WORD if codes.dim() == 3 else 0
    tensors = {
        "codes": codes.contiguous(), "scale": scale.contiguous(), "bitmap": bitmap,
        "starts": starts_of(bitmap, pattern, stride, columns),
    }  # fmt: skip
    if zero_point is not None:
        if not zero_point.is_floating_point():
            zero_point = packing.unpack_bits(zero_point, bits, scale.numel()).reshape(scale.shape)
        tensors["zero_point"] = zero_point.contiguous()
    center = levels // 2 if zero_point is None else 0
    size = 0 if size >= columns else size
    pairs = is_two_of_four(pattern, block, bits, size, columns)
    numbers = _numbers(MASKED, rows, columns, bits=bits, group_size=size, center=center, two_of_four=pairs)
    return Prepared(tensors, numbers, _undo_masked, plain(arguments), zero=float(center))


def _undo_masked(made: Prepared) -> Arguments:
    pattern, block = made.plain[6:8]
    zeros = made.tensors.get("zero_point")
    if zeros is not None and not zeros.is_floating_point():
        zeros = packing.pack_bits(zeros.flatten(), made.numbers["bits"])
    given = {0: made.tensors["codes"], 1: made.tensors["scale"], 2: zeros, 4: _positions(made, pattern, block)}
    return filled(made.plain, given)


def _values(arguments: Arguments) -> Prepared:
    values, positions, _, pattern, block, rows, columns = arguments
    if pattern in patterns.GROUP_PATTERNS or pattern == "full" or values.dtype == torch.float32:
        raise NotCovered(f"{values.dtype} values under pattern '{pattern}'")
    bitmap = _bitmap(positions, pattern, block, rows, columns)
    stride = values.shape[1] if values.dim() == 2 else 0
    tensors = {
        "codes": values.contiguous(), "bitmap": bitmap, "starts": starts_of(bitmap, pattern, stride, columns),
    }  # fmt: skip
    numbers = _numbers(MASKED, rows, columns, bits=16, two_of_four=is_two_of_four(pattern, block, 16, 0, columns))
    return Prepared(tensors, numbers, _undo_values, plain(arguments))


def _undo_values(made: Prepared) -> Arguments:
    return filled(made.plain, {0: made.tensors["codes"], 1: _positions(made, *made.plain[3:5])})


def _table(values: Tensor, bits: int) -> dict[str, Tensor]:
    whole = torch.zeros(1 << bits, device=values.device)
    whole[: values.numel()] = values.flatten().float()
    return {
        "table": whole, "pairs_half": layout.pair_table(whole.half()),
        "pairs_bfloat16": layout.pair_table(whole.bfloat16()),
    }  # fmt: skip


def _float(arguments: Arguments) -> Prepared:
    codes, scale, second, _, _, pattern, _, name, format, size, tile, rows, columns = arguments
    _only_full(pattern)
    if format == "fp8_e4m3":
        return _float8(arguments)
    bits = _bits(1 << tables.FORMATS[format])
    if bits > 4:
        raise NotCovered(f"'{format}'")
    groups = _groups(size or columns, bits, columns)
    tensors, more = _put_scales(scale, second, tile)
    tensors.update(_table(tables.table(format, codes.device), bits))
    tensors["codes"] = _put_codes(codes, name, bits, 1 << bits, columns, groups["span"], "pairs")
    return Prepared(tensors, _numbers(CODES, rows, columns, bits=bits, **groups, **more), _undo_float, plain(arguments))


def _float8(arguments: Arguments) -> Prepared:
    codes, scale, second, _, _, _, _, name, _, size, tile, rows, columns = arguments
    groups = _groups(size or columns, 8, columns, name == "bitstream")
    tensors, more = _put_scales(scale, second, tile)
    if groups["span"] != 16:
        raise NotCovered(f"E4M3 in groups of {size} columns")
    tensors["codes"] = _put_codes(codes, name, 8, 256, columns, 16, "halves")
    if bool((tensors["codes"] & 0x7F == NOT_A_NUMBER).any()):
        raise NotCovered("codes of E4M3 that are no numbers")
    if more["scale_layout"] == SINGLE and not groups["group_size"]:
        tensors["row_scale"] = scale.flatten().float()
    numbers = _numbers(CODES, rows, columns, bits=8, float8=1, **groups, **more)
    return Prepared(tensors, numbers, _undo_float, plain(arguments))


def _undo_float(made: Prepared) -> Arguments:
    scale, second = _take_scales(made)
    codes = _take_codes(made, made.plain[7], 1 << made.numbers["bits"])
    return filled(made.plain, {0: codes, 1: scale, 2: second})


def _lut(arguments: Arguments) -> Prepared:
    codes, lut, _, _, pattern, _, name, bits, rows_per_lut, size, rows, columns = arguments
    _only_full(pattern)
    across, groups, entries = lut.shape
    kept = {"lut": lut.new_empty(0, entries)}
    if across == 1 and groups == 1 and bits <= 4:
        tensors = {"codes": _put_codes(codes, name, bits, 1 << bits, columns, 8, "pairs"), **_table(lut, bits)}
        numbers = _numbers(CODES, rows, columns, bits=bits, span=8)
        return Prepared(tensors, numbers, _undo_lut, plain(arguments), kept=kept)
    own = _groups(size or columns, bits, columns)
    spread = lut.repeat_interleave(rows_per_lut, dim=0)[:rows]
    if bits in (3, 4) and lut.dtype != torch.float32:
        whole = torch.nn.functional.pad(spread, (0, (1 << bits) - entries))
        tensors = {
            "codes": _put_codes(codes, name, bits, 1 << bits, columns, own["span"], "nibbles"),
            "pairs_half": layout.pack_tables(whole.half()), "pairs_bfloat16": layout.pack_tables(whole.bfloat16()),
        }  # fmt: skip
        numbers = _numbers(CODES, rows, columns, bits=bits, half=int(lut.dtype == torch.float16), **own)
        return Prepared(tensors, numbers, _undo_lut, plain(arguments), kept=kept)
    if entries != 2 or bits != 1 or lut.dtype != torch.float16:
        raise NotCovered(f"tables of {entries} entries of {lut.dtype} for each row")
    tensors = {
        "codes": _put_codes(codes, name, bits, 2, columns, own["span"], "halves"),
        "scale": layout.pack_pairs(spread.contiguous().view(torch.int32).squeeze(-1)),
    }
    numbers = _numbers(CODES, rows, columns, bits=bits, scale_layout=PAIRS, **own)
    return Prepared(tensors, numbers, _undo_lut, plain(arguments), kept=kept)


def _undo_lut(made: Prepared) -> Arguments:
    name, bits, rows_per_lut = made.plain[6:9]
    dtype, entries = made.kept["lut"].dtype, made.kept["lut"].shape[1]
    if _table_of(made.tensors) == "rows":
        name_of = "pairs_half" if dtype == torch.float16 else "pairs_bfloat16"
        lut = layout.unpack_tables(made.tensors[name_of], made.rows, dtype)[::rows_per_lut, :, :entries]
    elif "table" in made.tensors:
        lut = made.tensors["table"][:entries].to(dtype).reshape(1, 1, -1)
    else:
        lut = layout.unpack_pairs(made.tensors["scale"], made.rows)[::rows_per_lut].unsqueeze(-1).view(dtype)
    return filled(made.plain, {0: _take_codes(made, name, 1 << bits), 1: lut.contiguous()})


# ---- Outliers.


def _csr(arguments: Arguments) -> Prepared:
    entries, row_ptr, half, rows, columns = arguments
    if row_ptr.shape[0] != 1:
        raise NotCovered(f"outliers in {columns} columns")
    made = Prepared({}, _numbers(ENTRIES, rows, columns, half=int(half)), _undo_csr, plain(arguments))
    put_entries_(made, entries, row_ptr, layout.quads_of(row_ptr[0].diff()))
    return made


def put_entries_(made: Prepared, entries: Tensor, row_ptr: Tensor, quads: int) -> None:
    """Compressed sparse rows as the tensors of a term of ENTRIES, so many ``quads`` of each row apart from the rest.
    The row pointers are kept, since zeros that fill up a row may be entries too."""
    packed, rest, rest_ptr = layout.pack_entries(entries, row_ptr[0], quads)
    own = {"entries": packed, "row_ptr": row_ptr.contiguous(), "rest": rest, "rest_ptr": rest_ptr.unsqueeze(0)}
    made.tensors.update(own)


def entries_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries of a term of ENTRIES, those of a row behind each other."""
    return layout.unpack_entries(tensors["entries"], tensors["rest"], tensors["row_ptr"][0])


def _undo_csr(made: Prepared) -> Arguments:
    return filled(made.plain, {0: entries_of(made.tensors), 1: made.tensors["row_ptr"]})


_PREPARE: dict[str, Callable[[Arguments], Prepared]] = {
    "integer": _integer, "float": _float, "lut": _lut, "csr": _csr, "values": _values,
}  # fmt: skip
