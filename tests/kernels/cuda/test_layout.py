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


def test_a_table_of_pairs() -> None:
    table = torch.randn(8).half()
    pairs = layout.pair_table(table).view(torch.float16).reshape(64, 2)
    assert all(torch.equal(pairs[index], table[[index % 8, index // 8]]) for index in range(64))
