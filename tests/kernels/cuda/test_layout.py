"""Execution layouts: any codes go there and come back, and take the bytes that they should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.kernels.cuda import layout


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(layout.BITS), span=st.sampled_from([4, 8]),
    order=st.sampled_from(["halves", "pairs", "nibbles"]), rows=st.integers(1, 40), columns=st.integers(1, 600),
    seed=st.integers(0, 3),
)  # fmt: skip
def test_codes_come_back(bits: int, span: int, order: layout.Order, rows: int, columns: int, seed: int) -> None:
    if (order == "pairs" and bits > 4) or (order == "nibbles" and bits not in (3, 4)):
        return
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = layout.pack_codes(codes, bits, span, order)
    step = layout.step_of(bits)
    assert packed.shape == (-(-rows // 16), -(-columns // step), step * bits // 256, 32, 4)
    assert torch.equal(layout.unpack_codes(packed, bits, span, order, rows, columns), codes)


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_numbers_and_tables_of_rows_come_back(rows: int) -> None:
    numbers = torch.randn(rows, 5).half()
    assert torch.equal(layout.unpack_pairs(layout.pack_pairs(numbers), rows), numbers)
    for entries in (8, 16):
        tables = torch.randn(rows, 3, entries).bfloat16()
        packed = layout.pack_tables(tables)
        assert packed.shape == (-(-rows // 16), 3, 8, 2, entries // 2)
        assert torch.equal(layout.unpack_tables(packed, rows, torch.bfloat16), tables)


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 90), min_size=1, max_size=40), quads=st.integers(0, 9), seed=st.integers(0, 3))
def test_entries_come_back(counts: list[int], quads: int, seed: int) -> None:
    row_ptr = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randint(-(1 << 31), 1 << 31, (sum(counts),), generator=generator).to(torch.int32)
    packed, rest, rest_ptr = layout.pack_entries(entries, row_ptr, quads)
    assert packed.shape == (-(-len(counts) // 16), quads, 32, 2)
    assert rest_ptr.diff().tolist() == [max(0, count - 4 * quads) for count in counts]
    assert torch.equal(layout.unpack_entries(packed, rest, row_ptr), entries)


def test_quads_hold_most_rows_whole() -> None:
    assert layout.quads_of(torch.full((64,), 18)) == 5
    assert layout.quads_of(torch.zeros(64, dtype=torch.int32)) == 0
    counts = torch.full((1600,), 18)
    counts[700] = 900  # not worth 220 quads for every row
    assert layout.quads_of(counts) == 5


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=20), size=st.sampled_from([16, 32, 64, 128]),
    seed=st.integers(0, 3),
)  # fmt: skip
def test_kept_groups_come_back(counts: list[int], size: int, seed: int) -> None:
    total, generator = sum(counts), torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (total, size), generator=generator).to(torch.uint8)
    scale = torch.rand(total, generator=generator).half()
    words, (spread,), starts = layout.pack_kept(codes, [scale], torch.tensor(counts))
    of_chunk = 128 // size
    assert starts.diff().tolist() == [-(-count // of_chunk) for count in counts]
    assert words.shape == (int(starts[-1]), 4, 4) and spread.shape == (int(starts[-1]), of_chunk)
    found, (back,) = layout.unpack_kept(words, [spread], torch.tensor(counts), size)
    assert torch.equal(found, codes) and torch.equal(back, scale)


def test_a_table_of_pairs() -> None:
    table = torch.randn(8).half()
    pairs = layout.pair_table(table).view(torch.float16).reshape(64, 2)
    assert all(torch.equal(pairs[index], table[[index % 8, index // 8]]) for index in range(64))
