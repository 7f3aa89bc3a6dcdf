"""Progress with an estimate of the time left, on stderr, for anything that takes more than a few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")

# Without a terminal (logs, CI) a line is printed at most this often, in seconds.
PLAIN_INTERVAL = 15.0


class Advance(Protocol):
    """Call to move a bar forward; ``note`` replaces the text behind it."""

    def __call__(self, steps: float = 1, note: str = "") -> None: ...


@contextmanager
def progress(label: str, total: float | None, *, live: bool = True) -> Iterator[Advance]:
    """A progress bar for ``total`` steps; yields the function that advances it.

    On a terminal it is a live bar with elapsed and remaining time; elsewhere it prints a plain line every
    ``PLAIN_INTERVAL`` seconds, so that a log shows life without filling up. ``live=False`` prints lines everywhere: a
    bar draws itself while something is timed, a line only when it is advanced.
    """
    if live and sys.stderr.isatty():
        with _terminal_bar(label, total) as advance:
            yield advance
    else:
        yield _plain_lines(label, total)


def announce(line: str) -> None:
    """A line for the person on stderr, such as the plan of a long job."""
    print(line, file=sys.stderr, flush=True)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items`` under a progress bar."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with progress(label, total) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def _terminal_bar(label: str, total: float | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total, note="")

        def advance(steps: float = 1, note: str = "") -> None:
            bars.update(task, advance=steps, note=note)

        yield advance


def _plain_lines(label: str, total: float | None) -> Advance:
    start = last = time.monotonic()
    done = 0.0

    def advance(steps: float = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL:
            return
        last = now
        line = f"{label}: {done:g}" + (f"/{total:g}" if total else "")
        if total and done:
            line += f", {(now - start) * (total - done) / done:.0f} s left"
        print(line + (f", {note}" if note else ""), file=sys.stderr, flush=True)

    return advance
