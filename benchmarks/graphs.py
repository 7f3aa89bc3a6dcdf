"""Times of GPU work: calls captured in a CUDA graph, replayed in turn with those of peers."""

from __future__ import annotations

import torch

from rarefy.kernels.cuda.measure import graph_of, microseconds

__all__ = ["bandwidth", "graph_of", "microseconds"]


def bandwidth() -> float:
    """Bytes per microsecond that a kernel reads and writes; copying is left to other engines, which may be slower."""
    source = torch.rand(1 << 28, device="cuda")
    target = torch.empty_like(source)
    graph = graph_of([lambda: torch.mul(source, 2.0, out=target)])
    return 2 * source.numel() * source.element_size() / microseconds({"copy": (graph, 1)}, 10)["copy"]
