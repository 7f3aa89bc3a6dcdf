"""What every benchmark shares: the machine it ran on, and the file it keeps its rows in."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def arguments(about: str) -> ArgumentParser:
    """The options that every benchmark has."""
    commit()
    parser = ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of everything")
    parser.add_argument("--json", type=Path, help="keep the results here; rows already there stay unless measured anew")
    return parser


def device_name() -> str:
    """The GPU, or else the processor, as its maker calls it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """The commit this runs at: ``$COMMIT`` in a copy with another history or none, else the work tree's, marked where
    it differs.

    Looked up once, when a benchmark starts: the work tree may move on while it runs.
    """
    if given := os.environ.get("COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return known.stdout.strip() or "unknown"


def key_of(row: Row, key: Sequence[str]) -> tuple[Any, ...]:
    """What tells a row from others: its values under ``key``, None where it has none."""
    return tuple(row.get(name) for name in key)


def read(path: Path | None) -> dict[str, Any]:
    """The results kept in ``path``; without rows if there is no such file."""
    if path is None or not path.is_file():
        return {"rows": []}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    found["rows"] = [{**row, "commit": row.get("commit", found["commit"])} for row in found["rows"]]
    return found


def merge(path: Path, result: dict[str, Any]) -> None:
    """Put the rows of ``result`` into the results in ``path``, in the place of rows that are equal under its ``key``.

    Processes may do this at the same time. Ends the program when the file is of another device or other versions,
    because rows of one file have to be comparable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known = read(path)
        for name in ("device", "versions"):
            if known["rows"] and known[name] != result[name]:
                raise SystemExit(f"'{path}' has rows of another {name} ({known[name]}); name another file.")
        key = result["key"]
        rows = {key_of(row, key): row for row in known["rows"]}
        rows.update({key_of(row, key): row for row in result["rows"]})
        whole = {**result, "rows": list(rows.values())}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
        part.replace(path)


def write(options: Namespace, rows: list[Row], key: Sequence[str]) -> None:
    """Keep the rows, known by their values under ``key``, in the file that was named, or else print them."""
    here = commit()
    result = {
        "device": device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "commit": here,
        "key": list(key),
        "rows": [{**row, "commit": here} for row in rows],
    }
    if options.json is None:
        print(json.dumps(result, indent=1))
        return
    merge(options.json, result)
    print(f"{len(rows)} rows written to {options.json}", file=sys.stderr)
