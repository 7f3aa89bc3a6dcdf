"""What the kernels of ``kernels/columns.py`` are given, one structure for processors and GPUs.

``rarefy_round``, ``rarefy_fit`` and ``rarefy_search`` of csrc/columns.h, ``Arguments`` of the kernels in CUDA.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from rarefy.core.errors import FormatError

ZEROS = ("none", "integer", "float")  # where the zero of even steps lies: at the middle code, at a code, anywhere
TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
AT_ONCE = 128  # columns of a call, and factors of a search, which lie in the structures themselves


class RoundArguments(ctypes.Structure):
    """Of ``round_columns``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "block errors shares scale zero codes marked lost reach unit".split()),
        *(
            (f"{name}_{step}", ctypes.c_longlong)
            for name, step in (
                ("block", "member"), ("block", "column"), ("errors", "member"), ("errors", "column"),
                ("shares", "member"), ("shares", "row"), ("unit", "member"), ("unit", "column"),
            )
        ),
        *((name, ctypes.c_int) for name in "members rows count width last".split()),
        ("group", ctypes.c_int * AT_ONCE),
    ]  # fmt: skip


class FitArguments(ctypes.Structure):
    """Of ``fit_around``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "columns unit mass threshold codes second scale zero".split()),
        *(
            (name, ctypes.c_longlong)
            for name in "columns_member columns_column unit_member unit_column mass_member".split()
        ),
        *((name, ctypes.c_int) for name in "members rows factors".split()),
        *((name, ctypes.c_float) for name in "finest tiny norm".split()),
        ("factor", ctypes.c_float * AT_ONCE),
    ]


class SearchArguments(ctypes.Structure):
    """Of ``search_ranges``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "weight importance found".split()),
        *((name, ctypes.c_longlong) for name in "rows columns group_size".split()),
        *((name, ctypes.c_int) for name in "factors levels zero type".split()),
        *((name, ctypes.c_float) for name in "finest norm".split()),
        ("factor", ctypes.c_float * AT_ONCE), ("step", ctypes.c_float * AT_ONCE),
    ]  # fmt: skip


def round_parts(
    block: Tensor, errors: Tensor, shares: Tensor, codes: Tensor | None, scale: Tensor | None, zero: Tensor | None,
    groups: list[int], last: int, marked: Tensor | None, lost: Tensor | None, reach: Tensor | None,
    unit: Tensor | None,
) -> Iterator[RoundArguments]:  # fmt: skip
    """`round_arguments` of a stretch, one for each ``AT_ONCE`` columns; none where there is nothing to round."""
    for first in range(0, errors.shape[1] if errors.numel() else 0, AT_ONCE):
        part = slice(first, first + AT_ONCE)
        cut = [None if own is None else own[part] for own in (codes, marked, lost)]
        yield round_arguments(
            block[:, first:], errors[:, part], shares[:, part, first:], cut[0], scale, zero, groups[part], last,
            cut[1], cut[2], reach, None if unit is None else unit[:, part],
        )  # fmt: skip


def round_arguments(
    block: Tensor, errors: Tensor, shares: Tensor, codes: Tensor | None, scale: Tensor | None, zero: Tensor | None,
    groups: list[int], last: int, marked: Tensor | None, lost: Tensor | None, reach: Tensor | None,
    unit: Tensor | None,
) -> RoundArguments:  # fmt: skip
    """``block``, ``errors`` and ``shares`` may be parts of larger tensors whose last dimension is dense, all others are
    dense. Raises FormatError where they are not."""
    members, count, rows = errors.shape
    others = (scale, zero, codes, marked, lost, reach)
    if not all(own is None or own.is_contiguous() for own in others) or block.stride(2) * shares.stride(2) != 1:
        raise FormatError("Columns, codes and marks of a stretch have to lie row by row; make them contiguous.")
    pointers = [0 if own is None else own.data_ptr() for own in (scale, zero, codes, marked, lost, reach, unit)]
    steps = (*block.stride()[:2], *errors.stride()[:2], *shares.stride()[:2])
    units = (0, 0) if unit is None else unit.stride()
    group = (ctypes.c_int * AT_ONCE)(*groups[:count])
    places = block.data_ptr(), errors.data_ptr(), shares.data_ptr()
    return RoundArguments(*places, *pointers, *steps, *units, members, rows, count, block.shape[1], last, group)


def fit_arguments(
    group: Tensor, unit: Tensor, mass: Tensor, threshold: Tensor, factors: list[float], norm: float, half: bool,
    found: tuple[Tensor, Tensor, Tensor, Tensor],
) -> FitArguments:  # fmt: skip
    """``mass`` is dense in its last dimension."""
    members, _, rows = group.shape
    pointers = [own.data_ptr() for own in (group, unit, mass, threshold, *found)]
    finest = torch.finfo(torch.float16 if half else torch.bfloat16).eps / 16
    tiny = torch.finfo(torch.float32).tiny
    factor = (ctypes.c_float * AT_ONCE)(*factors)
    steps = (*group.stride()[:2], *unit.stride(), mass.stride(0))
    return FitArguments(*pointers, *steps, members, rows, len(factors), finest, tiny, norm, factor)


def search_arguments(
    weight: Tensor, importance: Tensor | None, factors: list[float], norm: float, group_size: int, levels: int,
    zero: str, dtype: torch.dtype, found: Tensor,
) -> SearchArguments:  # fmt: skip
    """``weight`` and ``importance`` are dense."""
    pointers = weight.data_ptr(), 0 if importance is None else importance.data_ptr(), found.data_ptr()
    numbers = len(factors), levels, ZEROS.index(zero), TYPES[dtype], torch.finfo(dtype).eps / 16, norm
    factor, step = (ctypes.c_float * AT_ONCE)(*factors), (ctypes.c_float * AT_ONCE)()
    step[: len(factors)] = [2 / (levels - 1) * value for value in factors]
    return SearchArguments(*pointers, *weight.shape, group_size, *numbers, factor, step)
