"""``rarefy info``: what this installation can do on this machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rarefy.cli.common import Json, command, print_json


@command
def info(as_json: Json = False) -> None:
    """Show versions, devices and the kernel that serves each op."""
    import torch

    import rarefy
    from rarefy.core.memory import available_bytes, human
    from rarefy.kernels import ops
    from rarefy.sources.cache import cache_root

    free = available_bytes()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts: dict[str, Any] = {
        "rarefy": rarefy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            name: _version(name) for name in ("torch", "transformers", "safetensors", "gguf", "peft", "accelerate")
        },
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": gpus,
        "free_memory_bytes": free,
        "cache": str(cache_root()),
        "kernels": ops.kernels(),
    }
    if as_json:
        print_json(facts)
        return
    print(f"rarefy {facts['rarefy']}, Python {facts['python']}, {facts['platform']}")
    print("packages   " + ", ".join(f"{name} {number or '(absent)'}" for name, number in facts["packages"].items()))
    print(f"cpu        {facts['cpu']['cores']} cores, {facts['cpu']['threads']} threads, {facts['cpu']['isa']}")
    print(f"gpu        {', '.join(gpus) or 'none'}")
    print(f"memory     {human(free) + ' free' if free else 'unknown'}")
    print(f"cache      {facts['cache']}")
    print("kernels    of each op, by device ('any' is the reference in torch; faster ones appear beside it)")
    for op, table in sorted(facts["kernels"].items()):
        print(f"  {op:<18} " + ", ".join(f"{device}: {name}" for device, name in table.items()))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
