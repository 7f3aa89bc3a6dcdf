"""Which positions of a ``[rows, columns]`` matrix are stored, and in which order.

Kept entries always follow row-major order of the dense matrix, so one mask describes every pattern:

==============  =======  ======================================================  ======================
pattern         block    positions                                               kept entries
==============  =======  ======================================================  ======================
full            []       none                                                    ``[rows, columns]``
bitmap          []       int32 ``[rows, words(columns)]``                        ``[nnz]``
n_m             [n, m]   int32 ``[rows, words(columns)]``                        ``[rows, kept]``
n_m_rank        [n, m]   int32 ``[rows, words(groups), rank bits]``              ``[rows, kept]``
groups          [g]      uint8 ``[rows, kept groups, 2]`` (ascending ids)        ``[rows, kept groups * g]``
groups_csr      [g]      uint8 ``[kept groups, 2]``, int32 row_ptr ``[rows+1]``  ``[kept groups * g]``
groups_bitmap   [g]      int32 ``[rows, words(groups)]``                         ``[kept groups * g]``
==============  =======  ======================================================  ======================

The last group of a row may be shorter than ``m`` or ``g``; for group patterns its unused slots are stored as zero.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from rarefy import packing

GROUP_PATTERNS = ("groups", "groups_csr", "groups_bitmap")


def kept_of(length: int, n: int, m: int) -> int:
    """Entries kept of a (possibly short) group of ``length`` columns: ``ceil(n * length / m)``."""
    return -(-n * length // m)


def kept_per_row(columns: int, n: int, m: int) -> int:
    """Entries kept in a row of ``columns`` under ``n : m``."""
    return columns // m * n + kept_of(columns % m, n, m)


def rank_bits(n: int, m: int) -> int:
    """Bits of the number of an ``n``-subset of ``m`` positions."""
    return max(1, math.ceil(math.log2(math.comb(m, n))))


@functools.lru_cache(maxsize=64)
def subsets(n: int, m: int) -> Tensor:
    """All ways to keep ``n`` of ``m`` positions, bool ``[C(m, n), m]``, ordered by their bit pattern."""
    rows = sorted((sum(1 << index for index in chosen), chosen) for chosen in itertools.combinations(range(m), n))
    table = torch.zeros(len(rows), m, dtype=torch.bool, device="cpu")
    for row, (_, chosen) in enumerate(rows):
        table[row, list(chosen)] = True
    return table


def pack_ranks(mask: Tensor, n: int, m: int) -> Tensor:
    """The numbers of the subsets that ``mask [rows, columns]`` keeps, as the ``positions`` of ``n_m_rank``."""
    columns = mask.shape[1]
    whole = columns // m * m
    ranks = [_ranks(mask[:, :whole].unflatten(1, (-1, m)), n)] if whole else []
    if columns > whole:
        ranks.append(_ranks(mask[:, None, whole:], kept_of(columns - whole, n, m)))
    return packing.pack_bits(torch.cat(ranks, 1), rank_bits(n, m))


def _ranks(mask: Tensor, n: int) -> Tensor:
    """The number of each subset ``[..., m]`` in the order of ``subsets``."""
    m = mask.shape[-1]
    powers = 1 << torch.arange(m, device=mask.device)
    wanted = (mask * powers).sum(-1)
    known = (subsets(n, m).to(mask.device) * powers).sum(-1)
    return torch.searchsorted(known, wanted).to(torch.uint8)


def mask(
    pattern: str, block: list[int], positions: Tensor | None, row_ptr: Tensor | None, rows: int, columns: int
) -> Tensor:
    """The kept positions, bool ``[rows, columns]``."""
    if pattern in GROUP_PATTERNS:
        kept = group_mask(pattern, block, positions, row_ptr, rows, columns)
        return kept.repeat_interleave(min(block[0], columns), dim=1)[:, :columns]
    assert positions is not None
    if pattern in ("bitmap", "n_m"):
        return packing.unpack_bitmap(positions, columns)
    n, m = block
    ranks = packing.unpack_bits(positions, rank_bits(n, m), -(-columns // m)).to(torch.int64)
    whole = subsets(n, m).to(positions.device)[ranks[:, : columns // m]].flatten(1)
    tail = columns % m
    if not tail:
        return whole
    return torch.cat([whole, subsets(kept_of(tail, n, m), tail).to(positions.device)[ranks[:, -1]]], dim=1)


def group_mask(
    pattern: str, block: list[int], positions: Tensor | None, row_ptr: Tensor | None, rows: int, columns: int
) -> Tensor:
    """The kept groups of a group pattern, bool ``[rows, ceil(columns / g)]``."""
    assert positions is not None
    groups = -(-columns // block[0])
    if pattern == "groups_bitmap":
        return packing.unpack_bitmap(positions, groups)
    ids = packing.unpack_uint16(positions)
    kept = torch.zeros(rows, groups, dtype=torch.bool, device=positions.device)
    if pattern == "groups":
        return kept.scatter_(1, ids, True)
    assert row_ptr is not None
    row_of = torch.repeat_interleave(torch.arange(rows, device=ids.device), row_ptr.diff().to(torch.int64))
    kept[row_of, ids[: row_of.numel()]] = True  # a member of a stack may be followed by filling
    return kept


def scatter(
    kept: Tensor,
    pattern: str,
    block: list[int],
    positions: Tensor | None,
    row_ptr: Tensor | None,
    rows: int,
    columns: int,
) -> Tensor:
    """Put kept entries (any dtype, shape of the table above) into a dense ``[rows, columns]`` matrix of zeros."""
    if pattern == "full":
        return kept
    if pattern in GROUP_PATTERNS:
        chosen = group_mask(pattern, block, positions, row_ptr, rows, columns)
        width = min(block[0], columns)
        dense = kept.new_zeros(rows, chosen.shape[1], width)
        dense[chosen] = kept.reshape(-1, block[0])[: int(chosen.sum()), :width]
        return dense.flatten(1)[:, :columns]
    chosen = mask(pattern, block, positions, row_ptr, rows, columns)
    return kept.new_zeros(rows, columns).masked_scatter_(chosen, kept)


def scatter_groups(
    kept: Tensor,
    pattern: str,
    block: list[int],
    positions: Tensor | None,
    row_ptr: Tensor | None,
    rows: int,
    columns: int,
) -> Tensor:
    """Put per-kept-group parameters ``[kept groups..., extra]`` into ``[rows, groups, extra]``; others pass through."""
    if pattern not in GROUP_PATTERNS:
        return kept
    chosen = group_mask(pattern, block, positions, row_ptr, rows, columns)
    trailing = kept.shape[2:] if pattern == "groups" else kept.shape[1:]
    dense = kept.new_zeros(*chosen.shape, *trailing)
    dense[chosen] = kept.reshape(-1, *trailing)[: int(chosen.sum())]
    return dense
