"""The inner loop of solvers that go through a weight column by column: ``rarefy::round_columns``.

What a column loses is taken from the columns after it, each with its share. Rows do not touch each other, so that a
kernel has rows side by side and a stretch of columns in its registers; in torch it is some ten operations a column.
``rarefy::fit_around`` fits the two-level scales of one group for that loop, and is there where a kernel is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rarefy.core.devices import cpu_threads
from rarefy.kernels.column_arguments import AT_ONCE

# Rows from which on the work on a single column is worth more than one thread.
LARGE = 1 << 15
# What becomes of a column: all is rounded; what is not marked is dropped; what is marked stays as it is; or what would
# lose too much stays, and is marked.
Rule = Literal["every", "drop", "spare", "choose"]
RULES: tuple[Rule, ...] = ("every", "drop", "spare", "choose")

library = torch.library.Library("rarefy", "FRAGMENT")


def round_columns(
    block: Tensor,
    errors: Tensor,
    shares: Tensor,
    *,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    groups: Sequence[int] = (),
    last: int = 0,
    rule: Rule = "every",
    marked: Tensor | None = None,
    lost: Tensor | None = None,
    reach: Tensor | None = None,
    unit: Tensor | None = None,
) -> None:
    """Treat the first ``count`` columns of ``block``, float32 ``[members, width, rows]``, and correct those after them.

    ``errors`` float32 ``[members, count, rows]`` gets what each column loses; column ``k`` gives up ``shares[j, k]``
    (float32 ``[members, count, width]``) of the error of every ``j`` before it. ``block`` keeps each treated column as
    it was when its turn came. With ``codes`` (uint8 ``[count, members * rows]``, written) columns are rounded to
    ``scale * (code - zero)``, codes 0 to ``last``, with ``scale`` and ``zero`` float32 ``[groups, members * rows]`` and
    ``groups`` the group of each column; a scale of 0 means that all is zero. Without codes nothing is lost in rounding.

    ``marked`` bool ``[count, members * rows]`` says for ``drop`` what is kept, and all of the rest is lost; for
    ``spare`` what stays as it is, so that nothing is lost there. For ``choose`` it is written: a weight stays when
    rounding would take more than ``reach [members * rows]`` times ``unit [members, count]`` from it. With these two
    ``lost`` (float32, of its shape) gets what rounding takes or would take.
    """
    numbers = (codes, scale, zero, list(groups), last, rule, marked, lost, reach, unit)
    run = _kernel(block.device, "round_columns") if compiled(block.device) else reference
    run(block, errors, shares, *numbers)


def reference(
    block: Tensor,
    errors: Tensor,
    shares: Tensor,
    codes: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    groups: list[int],
    last: int,
    rule: str,
    marked: Tensor | None,
    lost: Tensor | None,
    reach: Tensor | None,
    unit: Tensor | None,
) -> None:
    """``round_columns`` in torch, a column after another. No step waits for the device."""
    members, count, rows = errors.shape
    flags = [] if marked is None else marked.view(count, members, rows).unbind()
    losses = errors.unbind(1) if lost is None else lost.view(count, members, rows).unbind()
    nothing = block.new_zeros(())
    if reach is not None and unit is not None:
        allowed = (reach.view(members, 1, rows) * unit.unsqueeze(-1)).unbind(1)
    if codes is not None:
        assert scale is not None and zero is not None
        written, zeros, scales = codes.unbind(), zero.unbind(), scale.unbind()
        # A group of zeros has scale 0, and every value of it is then at its zero point.
        steps = torch.where(scale == 0, torch.inf, scale).unbind()

    def treat(value: Tensor, index: int, error: Tensor) -> None:
        lacking = nothing if codes is None else losses[index]
        if codes is not None:
            group = groups[index]
            found = torch.addcdiv(zeros[group], value.flatten(), steps[group]).round_().clamp_(0, last)
            written[index].copy_(found)
            torch.sub(value, (found - zeros[group]).mul_(scales[group]).view_as(value), out=lacking)
        if rule == "choose":
            torch.gt(lacking.abs(), allowed[index], out=flags[index])
        if rule == "drop":
            torch.where(flags[index], lacking, value, out=error)
        elif rule in ("spare", "choose"):
            torch.where(flags[index], nothing, lacking, out=error)

    one_by_one(block, errors, shares, treat)


def one_by_one(
    block: Tensor, errors: Tensor, shares: Tensor, treat: Callable[[Tensor, int, Tensor], None]
) -> None:
    """For each column of ``round_columns``: ``treat`` its values and have what they lose written into its error, both
    ``[members, rows]``, then correct the columns after it."""
    # Views are made for many columns at once: each costs as much time as a small kernel.
    values, own, broad = block.unbind(1), errors.unbind(1), errors.unsqueeze(2).unbind(1)
    passed_on = shares.unsqueeze(-1).unbind(1)
    # One column is too little work to share between threads.
    with cpu_threads(1) if errors[:, 0].numel() < LARGE else nullcontext():
        for index, error in enumerate(own):
            treat(values[index], index, error)
            if left := block.shape[1] - index - 1:
                later = block.narrow(1, index + 1, left)
                later.addcmul_(passed_on[index].narrow(1, index + 1, left), broad[index], value=-1)


library.define(
    "round_columns(Tensor(a!) block, Tensor(b!) errors, Tensor shares, Tensor(c!)? codes, Tensor? scale, Tensor? zero, "
    "int[] groups, int last, str rule, Tensor(d!)? marked, Tensor(e!)? lost, Tensor? reach, Tensor? unit) -> ()"
)
library.impl("round_columns", reference, "CompositeExplicitAutograd")
torch.library.register_fake("rarefy::round_columns", lambda *arguments: None, lib=library)


MOST_COLUMNS = 32  # of a group that kernels hold in registers
SECOND_LEVEL = (torch.float16, torch.bfloat16)


def fit_around(
    columns: Tensor,
    unit: Tensor,
    mass: Tensor,
    threshold: Tensor,
    *,
    levels: int,
    bits: tuple[int, int],
    tile: int,
    dtype: torch.dtype,
    factors: Sequence[float] = (),
    norm: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two-level scales and real zeros of one group, float32 ``columns [members, size, rows]``: ``levels`` even steps.

    A weight that would spoil it takes no part: the cost of rounding the group, ``(error / unit) ** 2`` with
    ``unit [members, size]``, is lower without it by more than ``threshold [members * rows]``. The mean of the others
    stands in its place. Of ``factors`` by which the range is shrunk each row takes the one with the least
    ``mass * |error| ** norm``, ``mass [members, size]``. Scales have ``bits[0]`` bits and zeros ``bits[1]``, with steps
    and zeros of a ``tile`` of rows in ``dtype``, which span what its rows want. With ``factors``, and up to 4 bits for
    each code, a row then takes the pair of codes with the least of that error, otherwise the nearest ones. Returns the
    codes (uint8 ``[members * rows, 1]`` or ``[members * rows, 1, 2]``) and the second level (``[tiles, 1, 4]``) as they
    are stored (see ``reference/decode.py``), and the scale and the zero that they stand for, both float32
    ``[members * rows]``. Only where ``fits_around`` says so.
    """
    numbers = (list(factors), norm, levels, list(bits), tile, dtype == torch.float16)
    return _kernel(columns.device, "fit_around")(columns, unit, mass, threshold, *numbers)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Engine:
    """Kernels of one kind of device: whether they are there, the ops that they serve by name, and the most rows of a
    tile that ``fit_around`` takes."""

    available: Callable[[], bool]
    ops: Mapping[str, Callable[..., Any]]
    most_rows: int


engines: dict[str, Engine] = {}  # by device; each package of kernels adds its own


def add_engine(device: str, engine: Engine) -> None:
    """Have ``engine`` serve the ops on a kind of ``device`` ("cpu", "cuda")."""
    engines[device] = engine
    for name, kernel in engine.ops.items():
        library.impl(name, kernel, device.upper())


def _kernel(device: torch.device, name: str) -> Callable[..., Any]:
    """What serves an op, past the dispatcher, which takes longer than a kernel of a few columns."""
    return engines[device.type].ops[name]


def compiled(device: torch.device) -> bool:
    """Whether a kernel rounds columns on ``device``; otherwise torch does."""
    engine = engines.get(device.type)
    return engine is not None and engine.available()


def fits_around(device: torch.device, size: int, tile: int, dtype: torch.dtype, factors: int) -> bool:
    """Whether ``fit_around`` has a kernel on ``device`` for such groups."""
    small = size <= MOST_COLUMNS and factors <= AT_ONCE and dtype in SECOND_LEVEL
    return small and compiled(device) and tile.bit_count() == 1 and tile <= engines[device.type].most_rows


def empty_fit(columns: Tensor, bits: Sequence[int], tile: int, half: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for what ``fit_around`` finds."""
    rows = columns.shape[0] * columns.shape[2]
    codes = columns.new_empty((rows, 1) if max(bits) <= 4 else (rows, 1, 2), dtype=torch.uint8)
    second = columns.new_empty(-(-rows // tile), 1, 4, dtype=torch.float16 if half else torch.bfloat16)
    return codes, second, columns.new_empty(rows), columns.new_empty(rows)


def _fake_fit(columns: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_fit(columns, *rest[-3:])


library.define(
    "fit_around(Tensor columns, Tensor unit, Tensor mass, Tensor threshold, float[] factors, float norm, int levels, "
    "int[] bits, int tile, bool half) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.register_fake("rarefy::fit_around", _fake_fit, lib=library)


def search_ranges(
    weight: Tensor,
    importance: Tensor | None,
    factors: Sequence[float],
    norm: float,
    *,
    group_size: int,
    levels: int,
    zero: Literal["none", "integer", "float"],
    dtype: torch.dtype,
) -> Tensor:
    """For each group of ``weight``, float32 ``[rows, columns]``, the best of ``factors`` to shrink its range by.

    The best has the least sum of ``importance * |error| ** norm``, ``importance`` of the weight's shape, on a grid of
    ``levels`` even steps with scales in ``dtype``: ``zero`` is at the middle code, at a code, or anywhere and then in
    ``dtype`` too. Returns float32 ``[rows, groups]``. Only where ``compiled`` says so, for up to ``AT_ONCE`` factors.
    """
    numbers = (list(factors), norm, group_size, levels, zero, dtype)
    return _kernel(weight.device, "search_ranges")(weight, importance, *numbers)  # type: ignore[no-any-return]


def empty_search(weight: Tensor, group_size: int) -> Tensor:
    """Room for what ``search_ranges`` finds."""
    return weight.new_empty(weight.shape[0], -(-weight.shape[1] // group_size))


library.define(
    "search_ranges(Tensor weight, Tensor? importance, float[] factors, float norm, int group_size, int levels, "
    "str zero, ScalarType dtype) -> Tensor"
)
torch.library.register_fake(
    "rarefy::search_ranges", lambda weight, importance, *rest: empty_search(weight, rest[2]), lib=library
)
