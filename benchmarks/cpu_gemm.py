"""What one compressed layer costs on the CPU for many tokens at once: billions of multiplications a second.

As benchmarks/cpu_gemv.py, but the limit is arithmetic: ``fraction_of_limit`` is against torch's own product of 8-bit
integers (``torch._int_mm``) of the same shape, the best library for them at hand.
"""

from __future__ import annotations

import sys

import torch
from cpu_gemv import KEY, seconds
from harness import Row, arguments, write
from subjects_cpu import JOBS, PEERS, Job, largest_error, stored_terms


def measure(job: Job, rows: int, columns: int, tokens: int, rounds: int, threads: int) -> list[Row]:
    """Rows of one job: both executors against every peer."""
    from rarefy.kernels import cpu
    from rarefy.kernels.cpu import library

    made = [cpu.prepare(*term.operation()) for term in stored_terms(job, rows, columns)]  # type: ignore[misc]
    x = torch.randn(tokens, columns)
    left = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8)
    right = torch.randint(-127, 128, (rows, columns), dtype=torch.int8).t()
    calls = {
        "exact": [lambda: cpu.linear(x, made)],
        "fast": [lambda: cpu.linear(x, made, True)],
        "torch int8": [lambda: torch._int_mm(left, right)],
        **{name: [peer(rows, columns, x)[1]()] for name, peer in PEERS.items()},
    }
    took = seconds(calls, rounds)  # type: ignore[arg-type]
    error = {executor: largest_error(made, x, executor == "fast") for executor in ("exact", "fast")}
    work = 2 * tokens * rows * columns
    size = sum(term.bytes() for term in made)
    return [
        {
            "goal": "C4", "job": job.name, "shape": f"{rows}x{columns}", "tokens": tokens, "executor": executor,
            "threads": threads, "peer": peer, "instructions": library.instructions(),
            "ratio": took[peer] / took[executor], "fraction_of_limit": took["torch int8"] / took[executor],
            "milliseconds": took[executor] * 1e3, "gigaoperations_per_second": work / took[executor] / 1e9,
            "max_rel_error": error[executor], "bits_per_weight": size * 8 / rows / columns, "note": "",
        }
        for executor in ("exact", "fast")
        for peer in ("torch int8", *PEERS)
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--jobs", nargs="+", default=["int4 g128", "int3 g128 + 0.45%", "nf4 g128"], choices=list(JOBS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[Row] = []
    for name in options.jobs:
        for tokens in options.tokens:
            rows += measure(JOBS[name], 2048, 2048, tokens, 3 if options.quick else 9, options.threads)
            print(f"{name} {tokens}: {rows[-1]['gigaoperations_per_second']:.0f} GOP/s fast", file=sys.stderr)
    write(options, rows, KEY)


if __name__ == "__main__":
    main()
