"""What plans did: density, time by part, and every pass that stayed dense, by layer."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap

PARTS = ("estimate", "select", "execute")


@dataclass
class LayerReport:
    """One layer's passes. ``kept()`` of ``visible`` blocks were read in those that were sparse; ``seconds`` by part;
    ``executors`` and ``dense``: how often each ran, and why attention was dense."""

    counts: dict[torch.Size, Tensor] = field(default_factory=dict)  # blocks read, by shape: sums that nobody waits for
    visible: Tensor | float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    executors: Counter[str] = field(default_factory=Counter)
    dense: Counter[str] = field(default_factory=Counter)

    def count(self, block_map: BlockMap) -> None:
        """A pass that reads the blocks of this map. Those of a CUDA graph are not counted: it would go on reading sums
        that are given back when others take their place."""
        if block_map.count.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        shape = block_map.count.shape
        self.counts[shape] = self.counts[shape] + block_map.count if shape in self.counts else block_map.count
        self.visible += block_map.visible() * block_map.count.shape[1]

    def density(self) -> float:
        """Share of blocks in reach that were read in passes that were sparse; 1 where none was."""
        visible = float(self.visible)
        return self.kept() / visible if visible else 1.0

    def kept(self) -> int:
        """Blocks that were read in passes that were sparse."""
        return sum(int(count.sum()) for count in self.counts.values())


class Part:
    """Adds the seconds within it to ``seconds[name]``, those of work on ``device`` (None: nobody waits for it). Written
    out, since a generator would take longer than the part."""

    def __init__(self, seconds: dict[str, float], name: str, device: torch.device | None):
        self.seconds, self.name, self.device = seconds, name, device

    def __enter__(self) -> None:
        if self.device is not None:
            torch.cuda.synchronize(self.device)
        self.begin = time.perf_counter()

    def __exit__(self, *failure: object) -> None:
        if self.device is not None:
            torch.cuda.synchronize(self.device)
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.begin


@dataclass
class PlanReport:
    """``layers`` by number. ``timed``: wait for the device after each part, so that seconds are its own (slower).
    ``keep_maps``: keep each layer's last map in ``maps``, for those who want to look at it."""

    timed: bool = False
    keep_maps: bool = False
    layers: dict[int, LayerReport] = field(default_factory=dict)
    maps: dict[int, BlockMap] = field(default_factory=dict)

    def layer(self, number: int) -> LayerReport:
        if number not in self.layers:
            self.layers[number] = LayerReport()
        return self.layers[number]

    def clear(self) -> None:
        """Forget all passes."""
        self.layers.clear()
        self.maps.clear()

    def density(self) -> float:
        """`LayerReport.density` of all layers together."""
        visible = sum(float(layer.visible) for layer in self.layers.values())
        kept = sum(layer.kept() for layer in self.layers.values())
        return kept / visible if visible else 1.0

    def seconds(self) -> dict[str, float]:
        """Seconds of all layers by part."""
        return {part: sum(layer.seconds.get(part, 0.0) for layer in self.layers.values()) for part in PARTS}

    def dense(self) -> Counter[str]:
        """How many passes stayed dense, by reason."""
        return sum((layer.dense for layer in self.layers.values()), Counter())

    def part(self, number: int, name: str, device: torch.device) -> Part:
        """Count the time within as that of a part."""
        return Part(self.layer(number).seconds, name, device if self.timed and device.type == "cuda" else None)
