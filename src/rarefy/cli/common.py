"""What all commands share: exit codes, messages on stderr, results on stdout."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from rarefy.core.errors import OptionError, RarefyError

if TYPE_CHECKING:
    from rich.table import Table

P = ParamSpec("P")

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
NO_MEMORY = "error: Out of memory; close other programs, or use a smaller model, context or shard size."
# Torch reports a failed allocation as a RuntimeError of these words, on a GPU and on a CPU.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn failures into one sentence and an exit code: 2 bad input, 1 a failing machine, 130 Ctrl-C."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        _quiet_libraries()
        try:
            with _second_interrupt_leaves():
                function(*args, **kwargs)
            sys.stdout.flush()
        except RarefyError as failure:
            say(f"error: {failure}")
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            say(f"interrupted. {resume_hint()}".rstrip())
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read us has gone; Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None
        except MemoryError:
            say(NO_MEMORY)
            raise typer.Exit(FAILED) from None
        except RuntimeError as failure:
            if not any(sign in str(failure).lower() for sign in OUT_OF_MEMORY):
                raise
            say(NO_MEMORY)
            raise typer.Exit(FAILED) from None
        except OSError as failure:
            where = f" '{failure.filename}'" if failure.filename else ""
            say(f"error: {failure.strerror or failure}{where}; nothing was left half-written. {resume_hint()}".rstrip())
            raise typer.Exit(FAILED) from None
        except Exception as failure:
            # What safetensors raises when a disk is full; known by its name, since importing it costs start-up time.
            if type(failure).__name__ != "SafetensorError":
                raise
            say(f"error: A weight file could not be read or written ({failure}); check the disk.")
            raise typer.Exit(FAILED) from None

    return run


@contextmanager
def _second_interrupt_leaves() -> Iterator[None]:
    """Let the first Ctrl-C raise KeyboardInterrupt, and one that comes while things are being put away end at once."""

    def first(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, before)


@contextmanager
def starting() -> Iterator[None]:
    """No garbage collection while libraries and models load: nothing of that is garbage, and looking through it again
    and again takes longer than reading a tokenizer does. What is there afterwards is never looked at again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.enable()


def leads() -> bool:
    """Whether this process, of several that torchrun started, is the one that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def resume_hint() -> str:
    """The same command again, if it keeps its work; otherwise nothing."""
    if "--work-dir" not in " ".join(sys.argv):
        return ""
    return f"Go on with: {shell_line(*sys.argv[1:])}"


def shell_line(*arguments: str) -> str:
    """A command line of this program that can be pasted where it was called, also when it is not on the PATH."""
    if os.path.basename(sys.argv[0]) == "__main__.py":
        return shlex.join([_as_typed(sys.executable), "-m", "rarefy", *arguments])
    return shlex.join([_as_typed(sys.argv[0]), *arguments])


def _as_typed(path: str) -> str:
    found = shutil.which(os.path.basename(path))
    if found is not None and os.path.exists(path) and os.path.samefile(found, path):
        return os.path.basename(path)
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative


def say(text: str) -> None:
    """A line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(result: Any) -> None:
    """The result as JSON on stdout; numbers that JSON cannot hold become null."""
    print(json.dumps(_finite(result), indent=2))


def print_record(kind: str, result: dict[str, Any] | list[dict[str, Any]]) -> None:
    """The result as JSON that says what it is (``kind``) and how it was made (``run``), as reports read it."""
    from rarefy.core.environment import this_run

    run = this_run(shell_line(*sys.argv[1:])).model_dump()
    records = [{"kind": kind, **record, "run": run} for record in (result if isinstance(result, list) else [result])]
    print_json(records if isinstance(result, list) else records[0])


def print_table(headings: Iterable[str], rows: Iterable[Iterable[str]], text: bool = False) -> None:
    """A table on stdout; the first column is a name, the others are numbers unless ``text``."""
    from rich.console import Console
    from rich.table import Table

    table: Table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if text or index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False).print(table)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` pairs as recipe options; values are YAML scalars, dots in keys make nested options."""
    import yaml

    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise OptionError(f"--set '{pair}' is not of the form key=value; write it like --set num_bits=3.")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: what looks like a date and is none
            value = text
        inner = options
        *route, last = key.split(".")
        for part in route:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise OptionError(f"--set '{pair}' needs '{part}' to hold options, but it was set to a value.")
        inner[last] = value
    return options


def bits_line(bits: dict[str, float]) -> str:
    """``4.156 (codes 4.000, scales 0.156)``."""
    parts = ", ".join(f"{name} {value:.3f}" for name, value in bits.items() if name != "total" and value)
    return f"{bits['total']:.3f} ({parts})" if parts else f"{bits['total']:.3f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _quiet_libraries() -> None:
    """Our own notices on stderr; Transformers' bars and advice stay out of the way."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    root = logging.getLogger("rarefy")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(handler)
        root.propagate = False
    if not leads():
        root.setLevel(logging.ERROR)
