"""``rarefy info``: what this installation can do on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rarefy.cli.common import Json, command, print_json


@command
def info(as_json: Json = False) -> None:
    """Show versions, devices and the kernel that serves each op."""
    from rarefy.core.environment import this_environment
    from rarefy.core.memory import available_bytes, human
    from rarefy.kernels import cpu, cuda, ops
    from rarefy.sources.cache import cache_root

    free, native = available_bytes(), cpu.status()
    here = this_environment()
    facts: dict[str, Any] = {
        "rarefy": here.rarefy,
        "python": here.python,
        "platform": here.platform,
        "packages": here.packages,
        "cpu": {"name": here.processor, "cores": here.cores, "threads": here.threads, "isa": here.instructions},
        "gpus": list(here.gpus),
        "free_memory_bytes": free,
        "cache": str(cache_root()),
        "native": asdict(native),
        "gpu_kernels": cuda.status(),
        "kernels": ops.kernels(),
    }
    if as_json:
        print_json(facts)
        return
    print(f"rarefy {here.rarefy}, Python {here.python}, {here.platform}")
    print("packages   " + ", ".join(f"{name} {number or '(absent)'}" for name, number in here.packages.items()))
    print(f"cpu        {here.cores} cores, {here.threads} threads, {here.instructions}")
    print(f"native     {native.instructions}, {native.path}" if native.path else f"native     none: {native.reason}")
    print(f"gpu        {', '.join(here.gpus) or 'none'}; kernels: {cuda.status()}")
    print(f"memory     {human(free) + ' free' if free else 'unknown'}")
    print(f"cache      {facts['cache']}")
    print("kernels    of each op, by device ('any' is the reference in torch; layers on the CPU use 'native' instead)")
    for op, table in sorted(facts["kernels"].items()):
        print(f"  {op:<18} " + ", ".join(f"{device}: {name}" for device, name in table.items()))
