"""Dense tensors written as safetensors shards with their index, one shard in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.core.files import write_tensors, write_text

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 2 * 10**9


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    load: Callable[[str], torch.Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the tensors named in ``sizes`` (name -> bytes), in that order, to ``folder/model*.safetensors``.

    ``load(name)`` is called once for each name and must return a contiguous tensor of that many bytes. A tensor
    larger than ``max_shard_bytes`` gets a shard of its own. Raises OSError when the disk is full.
    """
    shards = plan_shards(sizes, max_shard_bytes)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_tensors(folder / file, {name: load(name) for name in names}, {"format": "pt"})
        places.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in the given order, cut into runs of at most ``max_shard_bytes``; at least one run."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
