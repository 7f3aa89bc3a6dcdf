"""What one compressed layer costs on the CPU for many tokens at once: billions of multiplications a second.

As benchmarks/cpu_gemv.py, but the limit is arithmetic: ``fraction_of_limit`` is against torch's own product of 8-bit
integers (``torch._int_mm``) of the same shape, the best library for them at hand. ``exact`` reads activations of
``--dtype``.
"""

from __future__ import annotations

import statistics
import sys

import peers_cpu
import torch
from cpu_gemv import KEY, Call, in_turns, made_of, ratio
from harness import Row, arguments, write
from subjects_cpu import JOBS, Job, largest_error

from rarefy.kernels import cpu
from rarefy.kernels.cpu import library

LIMIT = "torch int8"


def measure(
    job: Job, rows: int, columns: int, tokens: int, turns: int, peers: dict[str, peers_cpu.Peer], dtype: torch.dtype
) -> list[Row]:
    """Rows of one job: both executors against every peer."""
    made = made_of(job, rows, columns)
    x = torch.randn(tokens, columns).to(dtype)
    left = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8)
    right = torch.randint(-127, 128, (rows, columns), dtype=torch.int8).t()
    calls: dict[str, list[Call]] = {
        "exact": [lambda: cpu.linear(x, made)],
        "fast": [lambda: cpu.linear(x, made, True)],
        LIMIT: [lambda: torch._int_mm(left, right)],
        **{name: [peer(rows, columns, x.float())[1]()] for name, peer in peers.items()},
    }
    took = in_turns(calls, turns)
    error = {executor: largest_error(made, x, executor == "fast") for executor in ("exact", "fast")}
    size, work = sum(term.bytes() for term in made), 2 * tokens * rows * columns
    found: list[Row] = []
    for executor in ("exact", "fast"):
        mine = statistics.quantiles(took[executor])[0]
        for peer in (LIMIT, *peers):
            found.append({
                "goal": "C4", "job": job.name, "shape": f"{rows}x{columns}", "tokens": tokens, "executor": executor,
                "threads": torch.get_num_threads(), "peer": peer, "instructions": library.instructions(),
                "activations": str(dtype).removeprefix("torch."), "ratio": ratio(took[peer], took[executor]),
                "fraction_of_limit": ratio(took[LIMIT], took[executor]), "milliseconds": mine * 1e3,
                "gigaoperations_per_second": work / mine / 1e9, "max_rel_error": error[executor],
                "bits_per_weight": size * 8 / rows / columns, "turns": turns, "note": "",
            })  # fmt: skip
    return found


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--jobs", nargs="+", default=["int4 g128", "int3 g128 + 0.45%", "nf4 g128"], choices=list(JOBS))
    parser.add_argument("--peers", nargs="*", help="names of peers; all that are installed unless told")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    peers = peers_cpu.available(options.peers)
    rows: list[Row] = []
    for name in options.jobs:
        for tokens in options.tokens:
            for dtype in options.dtype:
                turns = options.turns // 4 if options.quick else options.turns
                rows += measure(JOBS[name], 2048, 2048, tokens, turns, peers, getattr(torch, dtype))
                speeds = {row["executor"]: row["gigaoperations_per_second"] for row in rows[-2 * len(peers) - 2 :]}
                print(f"{name} {tokens} {dtype}: {speeds}", file=sys.stderr)
    write(options, rows, (*KEY, "activations"))


if __name__ == "__main__":
    main()
