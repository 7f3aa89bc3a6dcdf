"""Times of GPU work: calls captured in a CUDA graph, replayed in turn with those of peers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

BEYOND_CACHE = 200e6  # bytes that no GPU keeps on the chip
WARM_UP = 3


def graph_of(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """All calls, warmed up, as one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls * 2:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[str, float]:
    """Median time of one call in each graph (of so many), in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + WARM_UP):
        for name, (graph, count) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if number >= WARM_UP:
                times[name].append(begin.elapsed_time(end) * 1e3 / count)
    return {name: statistics.median(each) for name, each in times.items()}


def bandwidth() -> float:
    """Bytes per microsecond that a kernel reads and writes; copying is left to other engines, which may be slower."""
    source = torch.rand(1 << 28, device="cuda")
    target = torch.empty_like(source)
    graph = graph_of([lambda: torch.mul(source, 2.0, out=target)])
    return 2 * source.numel() * source.element_size() / microseconds({"copy": (graph, 1)}, 10)["copy"]
