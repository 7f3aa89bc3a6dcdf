"""Damaged terms: what could mislead a kernel is refused by ``check`` in one sentence; nothing ever crashes."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy import packing
from rarefy.core.errors import FormatError
from rarefy.formats.grids import BinaryGrid, IntegerGrid
from rarefy.formats.layout import bind
from rarefy.formats.patterns import NM, Bitmap, Groups, Pattern
from rarefy.formats.scales import SingleScale
from rarefy.formats.terms import Dense, Quantized, Residual, Sparse, Term, TermSpec, parse_spec, stack
from tests.formats.samples import GRIDS, PATTERNS, TERMS, inputs, mask_for, quantized, residual, weight

STORED = [name for name in TERMS if name != "shared"]


def changed(term: Term, name: str, index: Any, value: Any) -> Term:
    """A copy of ``term`` with one stored number replaced."""
    damaged = copy.deepcopy(term)
    damaged.get_buffer(name)[index] = value
    return damaged


def word(bit: int) -> int:
    """The int32 number whose only set bit is ``bit``."""
    return 1 << bit if bit < 31 else -(1 << 31)


def replaced(term: Term, **tensors: Tensor) -> Term:
    """A copy of ``term`` with whole tensors replaced, as far as its layout lets their sizes vary."""
    stored = {**dict(term.named_buffers()), **tensors}
    bind(term.spec.layout(term.shape), {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()}, "term")
    return term.spec.build(term.shape, stored)


def sparse(pattern: Pattern, columns: int) -> Sparse:
    return Sparse.from_weight(weight(3, columns), mask_for(pattern, 3, columns), pattern)


def refused(term: Term, message: str) -> None:
    """``check`` refuses the term, and a stack that holds it."""
    with pytest.raises(FormatError, match=message):
        term.check()
    with pytest.raises(FormatError, match=message):
        stack([term, term]).check()


# ---- NaN


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_floats_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    whole = TERMS[name]()
    whole.check()
    for key, tensor in whole.named_buffers():
        if tensor.is_floating_point():
            refused(changed(whole, key, ... if tensor.dim() == 0 else (-1,) * tensor.dim(), bad), "NaN or infinity")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_outliers_that_are_not_finite_are_refused(dtype: str) -> None:
    term = Residual.from_weight(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), dtype)  # type: ignore[arg-type]
    for bad in (math.nan, math.inf):
        entries = packing.pack_entries(torch.full((6,), bad).to(getattr(torch, dtype)), torch.arange(3).repeat(2))
        refused(replaced(term, entries=entries), "'entries' hold NaN")


# ---- positions


@pytest.mark.parametrize("columns", [33, 40, 63])
def test_bits_beyond_the_last_column_are_refused(columns: int) -> None:
    for pattern in (Bitmap(), NM()):
        term = sparse(pattern, columns)
        for bit in range(columns % 32, 32):
            refused(changed(term, "bitmap", (2, 1), word(bit)), f"beyond {columns}")
    term = sparse(Groups(size=16, index="bitmap"), columns)
    refused(changed(term, "bitmap", (2, 0), 1 << -(-columns // 16)), f"beyond {-(-columns // 16)}")
    spec, tensors = inputs(columns)["rotated"]
    rotated = quantized(GRIDS["int4-row"], PATTERNS["full"], 3, columns, input=spec, input_tensors=tensors)
    refused(changed(rotated, "signs", 1, word(columns % 32)), f"beyond {columns}")


def test_a_bitmap_with_more_bits_than_stored_weights_is_refused() -> None:
    full = packing.pack_bitmap(torch.ones(6, 40) > 0)
    for term in (TERMS["five"](), TERMS["sparse"]()):
        refused(replaced(term, bitmap=full), "for 240 kept weights")


def test_a_group_bitmap_with_more_bits_than_stored_groups_is_refused() -> None:
    full = packing.pack_bitmap(torch.ones(6, 3) > 0)
    refused(replaced(TERMS["groups bitmap"](), bitmap=full), "for 288 kept weights")
    refused(replaced(TERMS["sparse bitmap"](), bitmap=full), "for 288 kept weights")
    codes = torch.zeros(9, 4, dtype=torch.int32)
    refused(replaced(TERMS["groups bitmap"](), bitmap=full, codes=codes), "numbers for 18 kept groups")


def test_a_group_that_keeps_another_number_is_refused() -> None:
    for term in (TERMS["sparse n:m"](), quantized(GRIDS["int4-row"], NM(), 6, 40)):
        word = int(term.get_buffer("bitmap")[0, 0])
        refused(changed(term, "bitmap", (0, 0), word ^ 1), "2 of every 4")


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 40), (4, 8, 40), (2, 4, 42), (2, 8, 41), (1, 4, 43)])
def test_a_number_that_names_no_subset_is_refused(n: int, m: int, columns: int) -> None:
    pattern = NM(n=n, m=m, index="rank")
    term = sparse(pattern, columns)
    groups, tail = -(-columns // m), columns % m
    bits = term.get_buffer("indices").shape[-1]
    ranks = packing.unpack_bits(term.get_buffer("indices"), bits, groups)
    limits = [math.comb(m, n)] * (groups - bool(tail)) + [math.comb(tail, -(-n * tail // m))] * bool(tail)
    for group, limit in ((0, limits[0]), (groups - 1, limits[-1])):
        for wrong in {limit, (1 << bits) - 1} - {value for value in range(limit)}:
            if wrong < 1 << bits:
                damaged = ranks.clone()
                damaged[1, group] = wrong
                refused(replaced(term, indices=packing.pack_bits(damaged, bits)), "names no")


@pytest.mark.parametrize("name", ["groups", "sparse ids", "groups csr", "sparse csr"])
def test_group_ids_out_of_bounds_or_order_are_refused(name: str) -> None:
    term = TERMS[name]()
    ids = packing.unpack_uint16(term.get_buffer("indices"))
    for wrong in (3, 255, 65535):
        damaged = ids.clone()
        damaged[-1] = wrong
        refused(replaced(term, indices=packing.pack_uint16(damaged)), f"group {wrong} of 3")
    if name in ("groups csr", "sparse csr"):
        pointer = term.get_buffer("row_ptr").tolist()
        row = next(row for row in range(6) if pointer[row + 1] - pointer[row] >= 2)
        first = pointer[row]
        for order in ([1, 0], [0, 0], [1, 1]):
            damaged = ids.clone()
            damaged[first : first + 2] = ids[first : first + 2][torch.tensor(order)]
            refused(replaced(term, indices=packing.pack_uint16(damaged)), "ascending order")


def test_listed_groups_of_a_row_ascend() -> None:
    pattern = Groups(size=4)
    mask = (torch.arange(16) // 4 % 2 == 0).expand(3, 16)
    term = Sparse.from_weight(weight(3, 16), mask, pattern)
    for wrong in ([2, 0], [2, 2], [0, 0]):
        ids = packing.unpack_uint16(term.get_buffer("indices"))
        ids[1] = torch.tensor(wrong)
        refused(replaced(term, indices=packing.pack_uint16(ids)), "ascending order")


@pytest.mark.parametrize("name", ["groups csr", "sparse csr", "two scales"])
@pytest.mark.parametrize("damage", ["start", "fall", "end", "negative", "huge"])
def test_row_pointers_that_do_not_rise_are_refused(name: str, damage: str) -> None:
    term = TERMS[name]()
    pointer = term.get_buffer("row_ptr")
    index, value = {
        "start": (0, 1),
        "fall": (3, int(pointer[-1]) + 1),
        "end": (-1, int(pointer[-1]) + 1),
        "negative": (2, -1),
        "huge": (-1, 2**31 - 1),
    }[damage]
    refused(changed(term, "row_ptr", index, value), "'row_ptr' does not rise")


@pytest.mark.parametrize("name", ["sparse ids", "sparse csr", "sparse bitmap", "sparse"])
def test_values_that_do_not_fill_their_slots_are_refused(name: str) -> None:
    term = TERMS[name]()
    values = term.get_buffer("values")
    fewer, more = values[..., :-1], torch.cat([values, values[..., :1]], -1)
    refused(replaced(term, values=fewer), "'values' holds")
    if name != "sparse":  # a flat list may end in filling, by whole groups
        refused(replaced(term, values=more), "'values' holds")
    if values.dim() == 2:
        refused(replaced(term, values=torch.cat([values, values], -1)), "'values' holds")


# ---- codes


def test_codes_beyond_their_table_are_refused() -> None:
    grid = BinaryGrid(regions=3, group_size=16)
    params = grid.fit(weight(3, 40))
    codes = torch.zeros(3, 40, dtype=torch.uint8)
    codes[2, 39] = 6
    for planes in (False, True):
        refused(Quantized.from_codes(codes, params, grid, planes=planes), "beyond the 6 entries")


@pytest.mark.parametrize(("name", "limit"), [("ternary", 3**5), ("five", 5**27)])
def test_words_beyond_their_radix_are_refused(name: str, limit: int) -> None:
    term = TERMS[name]()
    codes = term.get_buffer("codes")
    largest = 255 if codes.dtype == torch.uint8 else 2**63 - 1
    last = (-1,) * codes.dim()
    changed(term, "codes", last, limit - 1).check()
    for wrong in {limit, largest} | ({-1, -(2**63)} if codes.dtype == torch.int64 else set()):
        refused(changed(term, "codes", last, wrong), r"beyond \d \*\* ")


@pytest.mark.parametrize("name", ["groups", "groups csr", "groups bitmap", "five"])
def test_too_few_codes_are_refused(name: str) -> None:
    term = TERMS[name]()
    codes = term.get_buffer("codes")
    fewer = codes[:, :-1] if name == "groups" else codes[:-1]
    refused(replaced(term, codes=fewer), "'codes' hold .* for .* kept weights")


def test_too_few_zero_points_are_refused() -> None:
    for grid in (IntegerGrid(zero="integer", group_size=16), GRIDS["int4-bilevel8-integer"]):
        term = quantized(grid, Groups(size=16, index="csr"), 40, 40)
        zeros = term.get_buffer("zero_point")
        assert zeros.shape[0] > 1
        refused(replaced(term, zero_point=zeros[:-1]), "'zero_point' has")


# ---- residuals, inputs, partitions


def test_entries_beyond_the_last_column_are_refused() -> None:
    term = residual(6, 40)
    values, columns = packing.unpack_entries(term.get_buffer("entries"), torch.float16)
    for wrong in (40, 65535):
        columns[-1] = wrong
        refused(replaced(term, entries=packing.pack_entries(values, columns)), "column beyond 40")
    mask = torch.zeros(2, 65540, dtype=torch.bool)
    mask[:, 65539] = True
    wide = Residual.from_weight(mask.float(), mask)
    refused(changed(wide, "entries", 1, int(wide.get_buffer("entries")[1]) + 1), "column beyond 65540")


def test_entries_of_a_row_ascend() -> None:
    term = Residual.from_weight(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    values, columns = packing.unpack_entries(term.get_buffer("entries"), torch.float16)
    for wrong in ([0, 2, 1], [1, 0, 2], [0, 1, 1]):
        columns[3:] = torch.tensor(wrong)
        refused(replaced(term, entries=packing.pack_entries(values, columns)), "ascending order")


@pytest.mark.parametrize(
    "pointer",
    [
        [[1, 1, 2], [2, 3, 4]],
        [[0, 2, 1], [1, 3, 4]],
        [[0, 1, 2], [2, 3, 5]],
        [[0, 1, 2], [3, 3, 4]],
        [[0, 1, 2], [1, 3, 4]],
        [[0, 1, 3], [2, 3, 4]],
        [[0, 1, 2], [2, 3, -1]],
    ],
    ids=str,
)
def test_panels_that_do_not_follow_each_other_are_refused(pointer: list[list[int]]) -> None:
    mask = torch.zeros(2, 65540, dtype=torch.bool)
    mask[:, [5, 65539]] = True
    term = Residual.from_weight(mask.float(), mask)
    assert term.get_buffer("row_ptr").tolist() == [[0, 1, 2], [2, 3, 4]]
    refused(replaced(term, row_ptr=torch.tensor(pointer, dtype=torch.int32)), "'row_ptr'")


@pytest.mark.parametrize("wrong", [-1, 0, 40, 2**31 - 1])
def test_permutations_that_are_none_are_refused(wrong: int) -> None:
    term = TERMS["permuted"]()
    order = term.get_buffer("permutation")
    place = 7 if int(order[7]) != wrong else 8
    refused(changed(term, "permutation", place, wrong), "does not name every column once")
    for name, extent in (("rows ordered", 6), ("columns ordered", 40)):
        partition = TERMS[name]()
        value = wrong if wrong != 0 else int(partition.get_buffer("indices")[0])
        refused(changed(partition, "indices", extent - 1, value), "do not name every position once")


def test_experts_that_are_not_named_once_are_refused() -> None:
    members: list[Term] = [quantized(IntegerGrid(num_bits=bits), PATTERNS["full"], 3, 20) for bits in (4, 2, 4)]
    whole = stack(members)
    whole.check()
    for wrong in (-1, 2, 3):
        with pytest.raises(FormatError, match="do not name every position once"):
            changed(whole, "indices", 0, wrong).check()


@pytest.mark.parametrize("name", ["product", "columns", "rows"])
def test_parts_are_checked(name: str) -> None:
    term = TERMS[name]()
    key = next(key for key, tensor in term.named_buffers() if tensor.is_floating_point())
    tensor = term.get_buffer(key)
    refused(changed(term, key, (0,) * tensor.dim(), math.nan), "NaN or infinity")


# ---- descriptions


INT4 = {"type": "quantized", "grid": {"type": "integer"}}
DENSE = {"type": "dense"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "value"),
        ([], "value"),
        ("dense", "value"),
        (7, "value"),
        ({}, "discriminator|tag"),
        ({"type": "magic"}, "magic"),
        ({"type": ["dense"]}, "type|tag"),
        ({**DENSE, "colour": 1}, "colour"),
        ({**DENSE, "dtype": "float64"}, "dtype"),
        ({**DENSE, "dtype": 16}, "dtype"),
        ({**DENSE, "input": "raw"}, "input"),
        ({**DENSE, "input": {"type": "rotated", "signs": []}}, "signs"),
        ({"type": "quantized"}, "grid"),
        ({"type": "quantized", "grid": {"type": "integer", "num_bits": "4"}}, "num_bits"),
        ({"type": "quantized", "grid": {"type": "integer", "num_bits": 4.0}}, "num_bits"),
        ({"type": "quantized", "grid": {"type": "integer", "num_bits": True}}, "num_bits"),
        ({"type": "quantized", "grid": {"type": "integer", "num_bits": 9}}, "num_bits"),
        ({"type": "quantized", "grid": {"type": "integer", "num_bits": 1}}, "both signs"),
        ({"type": "quantized", "grid": {"type": "integer", "group_size": -16}}, "group_size"),
        ({"type": "quantized", "grid": {"type": "integer", "group_size": 2**31}}, "group_size"),
        ({"type": "quantized", "grid": {"type": "integer", "group_size": 10**300}}, "group_size"),
        ({"type": "quantized", "grid": {"type": "integer", "scales": {"type": "bilevel", "rows": 2**40}}}, "rows"),
        ({"type": "quantized", "grid": {"type": "float", "format": "fp5"}}, "format"),
        ({"type": "quantized", "grid": {"type": "level"}}, "radix"),
        ({**INT4, "packing": "radix"}, "radix"),
        ({**INT4, "packing": "planes", "pattern": {"type": "bitmap"}}, "planes"),
        ({**INT4, "multiplier": "yes"}, "multiplier"),
        ({**INT4, "pattern": {"type": "groups", "size": 8}}, "group_size 8"),
        ({**INT4, "pattern": {"type": "n_m", "n": 5}}, "larger than"),
        ({**INT4, "pattern": {"type": "n_m", "n": 8, "m": 16, "index": "rank"}}, "subsets"),
        ({**INT4, "pattern": {"type": "n_m", "n": 1, "m": 256, "index": "rank"}}, "subsets"),
        ({**INT4, "pattern": {"type": "n_m", "n": 10**9, "m": 2 * 10**9, "index": "rank"}}, "subsets"),
        ({"type": "product", "rank": 0, "left": DENSE, "right": DENSE}, "rank"),
        ({"type": "product", "rank": 1, "left": DENSE}, "right"),
        ({"type": "partition", "axis": "rows", "parts": []}, "parts"),
        ({"type": "partition", "axis": "heads", "parts": [{"size": 1, "term": DENSE}]}, "axis"),
        ({"type": "partition", "axis": "rows", "parts": [{"size": 0, "term": DENSE}]}, "size"),
        ({"type": "shared", "ref": ""}, "ref"),
        ({"type": "shared"}, "ref"),
        ({**DENSE, "dtype": object()}, "JSON"),
        ({**DENSE, 3: 4}, "3"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value)[:60].split(" at 0x")[0],  # equal in every process
)
def test_descriptions_that_make_no_sense_are_refused(data: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_spec(data)


@pytest.mark.parametrize("depth", [40, 1000, 20_000])
@pytest.mark.parametrize("kind", ["product", "partition", "list", "unknown"])
def test_descriptions_nested_without_end_are_refused(depth: int, kind: str) -> None:
    data: Any = DENSE
    wrap: Callable[[Any], Any] = {
        "product": lambda inner: {"type": "product", "rank": 1, "left": inner, "right": DENSE},
        "partition": lambda inner: {"type": "partition", "axis": "rows", "parts": [{"size": 1, "term": inner}]},
        "list": lambda inner: [inner],
        "unknown": lambda inner: {"left": inner},
    }[kind]
    for _ in range(depth):
        data = wrap(data)
    with pytest.raises(FormatError, match="nested deeper"):
        parse_spec(data)
    while data is not DENSE:  # freeing it all at once would recurse too
        inner = data.values() if isinstance(data, dict) else data
        data = next(value for value in inner if isinstance(value, dict | list))


@pytest.mark.parametrize("name", list(TERMS))
def test_descriptions_with_one_thing_changed_parse_or_are_refused(name: str) -> None:
    """Every leaf of every description replaced by values of every JSON type."""
    data = TERMS[name]().spec.model_dump(mode="json")

    def places(part: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        return [path, *(place for key, value in items for place in places(value, (*path, key)))]

    for place in places(data)[1:]:
        for value in (None, True, -1, 0, 3, 2**70, 1.5, "x", "", [], {}, [1], {"type": "full"}):
            damaged = copy.deepcopy(data)
            inner = damaged
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            try:
                spec = parse_spec(damaged)
                spec.layout((6, 40))
            except FormatError:
                continue
            assert isinstance(spec, TermSpec)


# ---- random damage


FRAGILE = [name for name in STORED if not isinstance(TERMS[name](), Dense)]


@pytest.mark.parametrize("name", FRAGILE)
def test_random_bytes_are_refused_or_decode(name: str) -> None:
    """After any change of stored bytes, either ``check`` refuses the term or every op takes it."""
    dice = random.Random(name)
    original = TERMS[name]()
    x = torch.randn(2, 40)
    for _ in range(40):
        term = copy.deepcopy(original)
        tensors = [tensor for tensor in term.buffers() if tensor.numel()]
        for _ in range(dice.choice((1, 1, 2, 5))):
            tensor = dice.choice(tensors)
            octets = tensor.view(-1).view(torch.uint8)
            octets[dice.randrange(len(octets))] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
        try:
            term.check()
        except FormatError:
            continue
        assert term.decode().shape == (6, 40) and term(x).shape == (2, 6)
        assert stack([term, original]).decode().shape == (2, 6, 40)


@pytest.mark.parametrize("name", FRAGILE)
def test_random_sizes_are_refused_or_decode(name: str) -> None:
    """Sizes that a file may choose freely, chosen at random: bound by the layout, checked, and then safe."""
    dice = random.Random(name)
    original = TERMS[name]()
    layout = original.spec.layout(original.shape)
    free = sorted({size for entry in layout.values() for size in entry.shape if isinstance(size, str)})
    sizes = bind(layout, {key: (t.dtype, tuple(t.shape)) for key, t in original.named_buffers()}, "term")
    near = [max(0, value + step) for value in sizes.values() for step in (-1, 1)]
    for _ in range(30 if free else 0):
        chosen = {**sizes, dice.choice(free): dice.choice([0, 1, 2, 3, 17, *near])}
        term = original.spec.empty(original.shape, chosen)
        stored = dict(original.named_buffers())
        for key, tensor in term.named_buffers():
            tensor.zero_()
            common = tuple(slice(min(pair)) for pair in zip(tensor.shape, stored[key].shape, strict=True))
            tensor[common] = stored[key][common]
        try:
            term.check()
        except FormatError:
            continue
        assert term.decode().shape == (6, 40) and term(torch.randn(2, 40)).shape == (2, 6)


def test_scales_of_any_bits_are_harmless() -> None:
    """Finite scales may be wild, but never undefined."""
    grid = IntegerGrid(zero="float", group_size=16, scales=SingleScale(dtype="float32"))
    term = quantized(grid, PATTERNS["full"], 3, 40)
    for key in ("scale", "zero_point"):
        for value in (1e-45, -1.0, 3e38):
            wild = changed(term, key, (0, 0), value)
            wild.check()
            assert wild.decode().shape == (3, 40)
