"""What one compressed layer costs on the CPU, a token at a time or a few: kernels against torch's and against memory.

The limit is a streaming read of as many bytes, measured in the same process between the rounds. Weights are rotated
through more memory than the caches hold, values are random, peers take turns, and a result counts only after it agreed
with float64. ``fraction_of_limit`` is the time of the read over ours; ``ratio`` the peer's time over ours.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from harness import Row, arguments, write
from subjects_cpu import JOBS, PEERS, Job, largest_error, stored_terms, streaming

KEY = ("goal", "job", "shape", "tokens", "executor", "threads", "peer", "instructions")
ROTATED = 160 << 20  # bytes of weights that take turns


def seconds(calls: dict[str, list[Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Median seconds of one call of each contestant; in every round all take their turn, over all their copies."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, copies in calls.items():
            begin = time.perf_counter()
            for call in copies:
                call()
            spent[name].append((time.perf_counter() - begin) / len(copies))
    return {name: statistics.median(times) for name, times in spent.items()}


def measure(job: Job, rows: int, columns: int, tokens: int, rounds: int, threads: int) -> list[Row]:
    """Rows of one job: both executors against every peer."""
    from rarefy.kernels import cpu
    from rarefy.kernels.cpu import library

    made = [cpu.prepare(*term.operation()) for term in stored_terms(job, rows, columns)]  # type: ignore[misc]
    size = sum(term.bytes() for term in made)
    x = torch.randn(tokens, columns)
    copies = [made, *(copy.deepcopy(made) for _ in range(max(1, ROTATED // size)))]
    calls: dict[str, list[Callable[[], object]]] = {
        "exact": [lambda own=own: cpu.linear(x, own) for own in copies],  # type: ignore[misc]
        "fast": [lambda own=own: cpu.linear(x, own, True) for own in copies],  # type: ignore[misc]
        "streaming read": [streaming(size) for _ in copies],
    }
    for name, peer in PEERS.items():
        dense_bytes, call = peer(rows, columns, x)
        calls[name] = [call() for _ in range(max(2, ROTATED // dense_bytes))]
    took = seconds(calls, rounds)
    error = {executor: largest_error(made, x, executor == "fast") for executor in ("exact", "fast")}
    return [
        {
            "goal": job.goal, "job": job.name, "shape": f"{rows}x{columns}", "tokens": tokens, "executor": executor,
            "threads": threads, "peer": peer, "instructions": library.instructions(),
            "ratio": took[peer] / took[executor], "fraction_of_limit": took["streaming read"] / took[executor],
            "microseconds": took[executor] * 1e6, "gigabytes_per_second": size / took[executor] / 1e9,
            "read_gigabytes_per_second": size / took["streaming read"] / 1e9, "max_rel_error": error[executor],
            "bits_per_weight": size * 8 / rows / columns,
            "note": "" if executor == "exact" or all(term.multiplies_bytes for term in made) else "parts run exact",
        }
        for executor in ("exact", "fast")
        for peer in ("streaming read", *PEERS)
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shapes = [(4096, 4096)] if options.quick else [(4096, 4096), (1536, 576), (8192, 2048)]
    rows: list[Row] = []
    for name in options.jobs:
        for shape in shapes:
            for tokens in options.tokens[:1] if options.quick else options.tokens:
                found = measure(JOBS[name], *shape, tokens, 5 if options.quick else 9, options.threads)
                part = found[-1]["fraction_of_limit"]
                print(f"{name} {shape} {tokens}: {part:.2f} of read", file=sys.stderr)
                rows += found
                if options.json is not None:  # kept as they come
                    write(options, found, KEY)
    if options.json is None:
        write(options, rows, KEY)


if __name__ == "__main__":
    main()
