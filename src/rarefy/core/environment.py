"""Where and by what a number was measured: versions, processor, GPUs, and the command."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rarefy.core.config import StrictModel
from rarefy.core.version import __version__

PACKAGES = ("torch", "transformers", "safetensors", "gguf", "peft", "accelerate", "lm-eval")


class Environment(StrictModel):
    """A machine and what is installed on it; a package of version None is absent."""

    rarefy: str
    python: str
    platform: str
    packages: dict[str, str | None]
    processor: str
    cores: int
    threads: int
    instructions: str
    gpus: tuple[str, ...]


class Run(StrictModel):
    """How a result came about: the command line, when (UTC), and where."""

    command: str
    date: str
    environment: Environment


def this_environment() -> Environment:
    """The environment of this process."""
    import torch

    return Environment(
        rarefy=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        processor=processor_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
    )


def this_run(command: str) -> Run:
    """A run of ``command`` that ends now, here."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    return Run(command=command, date=date, environment=this_environment())


def processor_name() -> str:
    """The processor as its maker calls it, where the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
