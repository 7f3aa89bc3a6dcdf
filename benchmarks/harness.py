"""What every benchmark shares: the machine it ran on, and the file it writes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from argparse import ArgumentParser, Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def arguments(about: str) -> ArgumentParser:
    """The options that every benchmark has."""
    parser = ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of everything")
    parser.add_argument("--json", type=Path, help="write the results here")
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


def write(options: Namespace, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print the rows as JSON, and keep them with device, versions and commit if a file was named."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    known = commit.stdout.strip() or os.environ.get("COMMIT", "unknown")  # a copy without history names it itself
    result = {
        "device": device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "commit": known,
        **facts,
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", "utf-8")
    print(text)
