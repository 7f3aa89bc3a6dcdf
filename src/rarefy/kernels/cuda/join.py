"""Weights of the same input as one: their rows follow each other, so that one product does the work of several.

Nothing is copied that matters: the parts' tensors become views of the whole's (row pointers of outliers excepted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rarefy.kernels.adjacent import together
from rarefy.kernels.cuda.layout import TILE, quads_of
from rarefy.kernels.cuda.prepared import CODES, ENTRIES, Prepared, entries_of, put_entries_

_TABLES = ("table", "pairs_half", "pairs_bfloat16")  # of one dimension where all rows share them


def join_(parts: Sequence[Prepared]) -> Prepared | None:
    """The weight ``[sum of rows, columns]`` of ``parts``, one term of each of several layers; None where their codes
    differ or rows do not fill tiles."""
    first = parts[0]
    if first.numbers["kind"] == ENTRIES:
        _with_quads_alike_(parts)
    if first.numbers["kind"] not in (CODES, ENTRIES) or not all(_alike(first, part) for part in parts):
        return None
    tall = TILE * (first.numbers["second_rows"] if "second_order" in first.tensors else 1)
    if any(part.rows % tall for part in parts[:-1]):
        return None
    tensors = dict(first.tensors)
    for name, tensor in first.tensors.items():
        if name in ("row_ptr", "rest_ptr"):
            tensors[name] = _pointers([part.tensors[name] for part in parts])
        elif not _shared(name, tensor):
            tensors[name], places = together([part.tensors[name] for part in parts])
            for part, place in zip(parts, places, strict=True):
                part.tensors[name] = place
    rows = sum(part.rows for part in parts)
    plain = (*first.plain[:-2], rows, first.columns)
    return replace(first, tensors=tensors, numbers={**first.numbers, "rows": rows}, plain=plain)


def _alike(one: Prepared, other: Prepared) -> bool:
    return (
        {**one.numbers, "rows": 0} == {**other.numbers, "rows": 0}
        and (one.multiplier, one.plain[:-2]) == (other.multiplier, other.plain[:-2])
        and list(one.tensors) == list(other.tensors)
        and all(one.tensors[name].dtype == other.tensors[name].dtype for name in one.tensors)
        and all(
            torch.equal(one.tensors[name], other.tensors[name])
            for name in one.tensors
            if _shared(name, one.tensors[name])
        )
    )


def _with_quads_alike_(parts: Sequence[Prepared]) -> None:
    """As many quads in each row as all rows together want."""
    if any(part.numbers["kind"] != ENTRIES for part in parts):
        return
    quads = quads_of(torch.cat([part.tensors["row_ptr"][0].diff() for part in parts]))
    for part in parts:
        if part.tensors["entries"].shape[1] != quads:
            put_entries_(part, entries_of(part.tensors), part.tensors["row_ptr"], quads)


def _shared(name: str, tensor: Tensor) -> bool:
    return name in _TABLES and tensor.dim() == 1


def _pointers(parts: Sequence[Tensor]) -> Tensor:
    """Row pointers ``[1, rows + 1]`` into the entries of all."""
    found, start = [parts[0][:, :1]], 0
    for part in parts:
        found.append(part[:, 1:] + start)
        start += int(part[0, -1])
    return torch.cat(found, 1)
