"""Bits in words: every layout goes both ways, and means what its table says, at any size."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy import packing
from rarefy.core.errors import FormatError

RAGGED = [0, 1, 2, 3, 5, 26, 27, 28, 31, 32, 33, 54, 63, 64, 65, 77, 129]
LEADS = [(), (1,), (3,), (0,), (2, 3), (2, 0)]


def drawn(lead: tuple[int, ...], count: int, levels: int, seed: int) -> Tensor:
    return torch.randint(0, levels, (*lead, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def run_of(words: Tensor, bits: int = 32) -> int:
    """The big integer whose little-endian words these are."""
    return sum((int(word) & ((1 << bits) - 1)) << (bits * index) for index, word in enumerate(words.flatten()))


leads = st.sampled_from(LEADS)
counts = st.one_of(st.sampled_from(RAGGED), st.integers(0, 200))
seeds = st.integers(0, 2**31)


@settings(max_examples=120)
@given(lead=leads, count=counts, num_bits=st.integers(1, 8), seed=seeds)
def test_bit_streams_go_both_ways(lead: tuple[int, ...], count: int, num_bits: int, seed: int) -> None:
    codes = drawn(lead, count, 1 << num_bits, seed)
    stream = packing.pack_bits(codes, num_bits)
    assert stream.dtype == torch.int32 and stream.is_contiguous()
    assert stream.shape == (*lead, -(-count // 32), num_bits)
    back = packing.unpack_bits(stream, num_bits, count)
    assert back.dtype == torch.uint8 and torch.equal(back, codes)


@settings(max_examples=60)
@given(count=counts, num_bits=st.integers(1, 8), seed=seeds)
def test_a_bit_stream_is_the_big_integer_of_its_definition(count: int, num_bits: int, seed: int) -> None:
    codes = drawn((), count, 1 << num_bits, seed)
    number = run_of(packing.pack_bits(codes, num_bits))
    mask = (1 << num_bits) - 1
    assert [number >> (index * num_bits) & mask for index in range(count)] == codes.tolist()
    assert number >> (count * num_bits) == 0, "bits beyond the last code are set"


@settings(max_examples=60)
@given(lead=leads, count=counts, num_bits=st.integers(1, 8), seed=seeds)
def test_planes_hold_one_bit_of_every_code(lead: tuple[int, ...], count: int, num_bits: int, seed: int) -> None:
    codes = drawn(lead, count, 1 << num_bits, seed)
    planes = packing.pack_planes(codes, num_bits)
    assert planes.dtype == torch.int32 and planes.shape == (num_bits, *lead, -(-count // 32))
    assert torch.equal(packing.unpack_planes(planes, num_bits, count), codes)
    for plane, kept in enumerate(planes):
        assert torch.equal(packing.unpack_bitmap(kept, count), (codes >> plane & 1).bool())
    # Dropping low planes is any-precision reading: the top planes are the codes of fewer bits.
    if num_bits > 1:
        assert torch.equal(packing.unpack_planes(planes[1:], num_bits - 1, count), codes >> 1)


@settings(max_examples=60)
@given(lead=leads, count=counts, seed=seeds)
def test_bitmaps_mark_columns(lead: tuple[int, ...], count: int, seed: int) -> None:
    flags = drawn(lead, count, 2, seed).bool()
    bitmap = packing.pack_bitmap(flags)
    assert bitmap.dtype == torch.int32 and bitmap.shape == (*lead, -(-count // 32))
    assert packing.unpack_bitmap(bitmap, count).dtype == torch.bool
    assert torch.equal(packing.unpack_bitmap(bitmap, count), flags)
    if flags.numel():
        row, words = flags.reshape(-1, count)[-1], bitmap.reshape(-1, bitmap.shape[-1])[-1]
        assert run_of(words) == sum(1 << index for index in range(count) if row[index])


@settings(max_examples=80)
@given(lead=leads, count=counts, radix=st.sampled_from([3, 5]), seed=seeds)
def test_mixed_radix_words_are_numbers_of_their_radix(lead: tuple[int, ...], count: int, radix: int, seed: int) -> None:
    codes = drawn(lead, count, radix, seed)
    per_word, dtype = packing.RADIX[radix]
    packed = packing.pack_radix(codes, radix)
    assert packed.dtype == dtype and packed.shape == (*lead, -(-count // per_word))
    back = packing.unpack_radix(packed, radix, count)
    assert back.dtype == torch.uint8 and torch.equal(back, codes)
    if codes.numel():
        first = codes.reshape(-1, count)[0].tolist()
        for index, word in enumerate(packed.reshape(-1, packed.shape[-1])[0].tolist()):
            digits = first[index * per_word : (index + 1) * per_word]
            assert word == sum(digit * radix**place for place, digit in enumerate(digits))


@pytest.mark.parametrize(("radix", "bits_per_code"), [(3, 1.6), (5, 64 / 27)])
def test_the_largest_radix_word_fits(radix: int, bits_per_code: float) -> None:
    per_word = packing.RADIX[radix][0]
    codes = torch.full((per_word,), radix - 1, dtype=torch.uint8)
    packed = packing.pack_radix(codes, radix)
    assert packed.item() == radix**per_word - 1
    assert torch.equal(packing.unpack_radix(packed, radix, per_word), codes)
    assert packed.element_size() * 8 / per_word == pytest.approx(bits_per_code)


@settings(max_examples=40)
@given(lead=leads, count=counts, seed=seeds)
def test_uint16_is_two_little_endian_bytes(lead: tuple[int, ...], count: int, seed: int) -> None:
    numbers = torch.randint(0, 1 << 16, (*lead, count), generator=torch.Generator().manual_seed(seed))
    octets = packing.pack_uint16(numbers)
    assert octets.dtype == torch.uint8 and octets.shape == (*lead, count, 2)
    assert torch.equal(packing.unpack_uint16(octets), numbers)
    assert bytes(octets.flatten().tolist()) == struct.pack(f"<{numbers.numel()}H", *numbers.flatten().tolist())


@settings(max_examples=40)
@given(
    bits=st.lists(st.integers(0, 65535), max_size=40),
    column=st.sampled_from([0, 1, 32767, 32768, 65535]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_entries_hold_any_value_and_any_column(bits: list[int], column: int, dtype: torch.dtype) -> None:
    patterns = torch.tensor(bits, dtype=torch.int32).to(torch.int16)
    columns = torch.full((len(bits),), column)
    entries = packing.pack_entries(patterns.view(dtype), columns)
    assert entries.dtype == torch.int32 and entries.shape == (len(bits),)
    assert [int(entry) & 0xFFFFFFFF for entry in entries] == [bit << 16 | column for bit in bits]
    values, back = packing.unpack_entries(entries, dtype)
    assert values.dtype == dtype and torch.equal(values.view(torch.int16), patterns)
    assert back.dtype == torch.int64 and torch.equal(back, columns)


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_inputs_need_not_be_contiguous(num_bits: int) -> None:
    codes = drawn((65,), 6, 1 << num_bits, 1)
    for view in (codes.t(), codes[::2], codes[:, 1::2], codes.expand(2, 65, 6)):
        plain = view.contiguous()
        assert torch.equal(packing.pack_bits(view, num_bits), packing.pack_bits(plain, num_bits))
        assert torch.equal(packing.pack_planes(view, num_bits), packing.pack_planes(plain, num_bits))
    stream = packing.pack_bits(codes.t(), num_bits)
    turned = stream.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous() or num_bits == 1
    assert torch.equal(packing.unpack_bits(turned, num_bits, 65), codes.t())
    planes = packing.pack_planes(codes.t(), num_bits)
    assert torch.equal(packing.unpack_planes(planes.mT.contiguous().mT, num_bits, 65), codes.t())


def test_radix_numbers_and_entries_need_not_be_contiguous() -> None:
    codes = drawn((65,), 6, 3, 1)
    for radix in packing.RADIX:
        packed = packing.pack_radix(codes.t(), radix)
        assert torch.equal(packing.unpack_radix(packed.t().contiguous().t(), radix, 65), codes.t())
    numbers = torch.arange(24).reshape(4, 6).t()
    assert torch.equal(packing.unpack_uint16(packing.pack_uint16(numbers)), numbers)
    values = torch.randn(10, dtype=torch.float16)[::2]
    entries = packing.pack_entries(values, torch.arange(10)[::2])
    assert torch.equal(packing.unpack_entries(entries, torch.float16)[0], values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_is_taken(dtype: torch.dtype) -> None:
    codes = torch.tensor([0, 1, 2, 1, 0, 2, 2], dtype=dtype)
    plain = codes.to(torch.uint8)
    assert torch.equal(packing.unpack_bits(packing.pack_bits(codes, 2), 2, 7), plain)
    assert torch.equal(packing.unpack_planes(packing.pack_planes(codes, 2), 2, 7), plain)
    assert torch.equal(packing.unpack_radix(packing.pack_radix(codes, 3), 3, 7), plain)
    assert torch.equal(packing.unpack_uint16(packing.pack_uint16(codes)), plain.long())


REFUSED = [
    ("bits", lambda codes: packing.pack_bits(codes, 3), 8),
    ("planes", lambda codes: packing.pack_planes(codes, 3), 8),
    ("bitmap", packing.pack_bitmap, 2),
    ("radix 3", lambda codes: packing.pack_radix(codes, 3), 3),
    ("radix 5", lambda codes: packing.pack_radix(codes, 5), 5),
    ("uint16", packing.pack_uint16, 1 << 16),
    ("columns", lambda codes: packing.pack_entries(torch.zeros(codes.shape, dtype=torch.float16), codes), 1 << 16),
]


@pytest.mark.parametrize(("name", "pack", "limit"), REFUSED, ids=[row[0] for row in REFUSED])
@pytest.mark.parametrize("where", [0, -1])
def test_codes_out_of_range_are_refused(name: str, pack: object, limit: int, where: int) -> None:
    assert callable(pack)
    codes = torch.zeros(41, dtype=torch.int64)
    codes[where] = limit - 1
    pack(codes)
    for wrong in (limit, -1, 256 * limit, 1 << 40, -(1 << 40)):
        codes[where] = wrong
        with pytest.raises(FormatError, match=f"0 to {limit - 1}"):
            pack(codes)


@pytest.mark.parametrize(("name", "pack", "limit"), REFUSED, ids=[row[0] for row in REFUSED])
def test_codes_that_are_not_whole_numbers_are_refused(name: str, pack: object, limit: int) -> None:
    assert callable(pack)
    for value in (0.5, float("nan")):
        with pytest.raises(FormatError, match="whole numbers"):
            pack(torch.full((3,), value))


@pytest.mark.parametrize("num_bits", [0, 9, -1])
def test_bit_widths_outside_1_to_8_are_refused(num_bits: int) -> None:
    codes = torch.zeros(3, dtype=torch.uint8)
    for call in (
        lambda: packing.pack_bits(codes, num_bits),
        lambda: packing.pack_planes(codes, num_bits),
        lambda: packing.unpack_bits(torch.zeros(1, 1, dtype=torch.int32), num_bits, 3),
    ):
        with pytest.raises(FormatError, match="1 to 8 bits"):
            call()


def test_entries_of_wider_values_are_refused() -> None:
    with pytest.raises(FormatError, match="16-bit"):
        packing.pack_entries(torch.zeros(2), torch.arange(2))
