"""What one compressed layer costs on the CPU, a token at a time or a few: kernels against torch's and against memory.

The limit is a streaming read of as many bytes. All take turns call by call, each over copies of its weight that are
together more than the caches hold; values are random, and a result counts only after it agreed with float64. Machines
are shared: ``ratio`` is the median over turns of the peer's time over ours in the same turn, ``fraction_of_limit``
that of the read, so that what slows one turn down slows it for all; ``microseconds`` is the lower quartile. Before
each call that counts comes one of a small weight, as in a model another layer comes before.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import peers_cpu
import torch
from harness import Row, arguments, write
from subjects_cpu import JOBS, Job, largest_error, stored_terms, streaming

from rarefy.kernels import cpu
from rarefy.kernels.cpu import library
from rarefy.kernels.cpu.memory import gather_

KEY = ("goal", "job", "shape", "tokens", "executor", "threads", "peer", "instructions")
ROTATED = 96 << 20  # bytes of weights that take turns
READ = "streaming read"
SMALL = (64, 256)  # rows and columns of a weight of which nobody counts the time
Call = Callable[[], object]


def in_turns(
    calls: dict[str, list[Call]], turns: int, before: dict[str, Call] | None = None
) -> dict[str, list[float]]:
    """Seconds of each contestant's call in each turn, after one turn that does not count; who begins changes.

    ``before`` is called before each of its calls, and not counted.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(-1, turns):
        for name in order:
            call = calls[name][turn % len(calls[name])]
            if before is not None:
                before[name]()
            begin = time.perf_counter()
            call()
            took = time.perf_counter() - begin
            if turn >= 0:
                spent[name].append(took)
        order = [*order[1:], order[0]]
    return spent


def ratio(peer: list[float], own: list[float]) -> float:
    """How many times as long as ours the peer took, in the middle of all turns."""
    return statistics.median(theirs / ours for theirs, ours in zip(peer, own, strict=True))


def made_of(job: Job, rows: int, columns: int) -> list[cpu.Prepared]:
    return [cpu.prepare(*term.operation()) for term in stored_terms(job, rows, columns)]  # type: ignore[misc]


def another(made: list[cpu.Prepared]) -> list[cpu.Prepared]:
    """The same weight elsewhere in memory, laid out as models are."""
    own = [replace(term, tensors={name: tensor.clone() for name, tensor in term.tensors.items()}) for term in made]
    gather_(own)
    return own


def products(made: list[cpu.Prepared], x: torch.Tensor) -> dict[str, list[Call]]:
    """Calls of both executors over copies of the weight, of which they never take the same one in a turn: the second
    would find it in the cache."""
    size = sum(term.bytes() for term in made)
    copies = [made, *(another(made) for _ in range(max(1, ROTATED // size)))]
    half = len(copies) // 2
    return {
        "exact": [lambda own=own: cpu.linear(x, own) for own in copies],  # type: ignore[misc]
        "fast": [lambda own=own: cpu.linear(x, own, True) for own in copies[half:] + copies[:half]],  # type: ignore[misc]
    }


def small_calls(job: Job, x: torch.Tensor, peers: dict[str, peers_cpu.Peer]) -> dict[str, Call]:
    """Calls of every contestant on a small weight: in a model the layer before has brought the same code to the caches,
    which another contestant's weights have since swept out."""
    rows, columns = SMALL
    own = x[:, :columns].contiguous()
    made = made_of(job, rows, columns)
    calls: dict[str, Call] = {
        "exact": lambda: cpu.linear(own, made), "fast": lambda: cpu.linear(own, made, True), READ: streaming(4096),
    }  # fmt: skip
    return calls | {name: peer(rows, columns, own)[1]() for name, peer in peers.items()}


def measure(job: Job, rows: int, columns: int, tokens: int, turns: int, peers: dict[str, peers_cpu.Peer]) -> list[Row]:
    """Rows of one job: both executors against every peer."""
    made = made_of(job, rows, columns)
    size = sum(term.bytes() for term in made)
    x = torch.randn(tokens, columns)
    calls = products(made, x)
    calls[READ] = [streaming(size) for _ in range(len(calls["fast"]))]
    before = small_calls(job, x, peers)
    for name, peer in peers.items():
        peer_bytes, call = peer(rows, columns, x)
        calls[name] = [call() for _ in range(max(2, ROTATED // peer_bytes))]
    if job.beside is not None:
        beside = products(made_of(JOBS[job.beside], rows, columns), x)
        calls.update({f"own {job.beside} {executor}": copies for executor, copies in beside.items()})
        before |= {f"own {job.beside} {executor}": before[executor] for executor in beside}
    took = in_turns(calls, turns, before)
    error = {executor: largest_error(made, x, executor == "fast") for executor in ("exact", "fast")}
    found: list[Row] = []
    for executor in ("exact", "fast"):
        own = [] if job.beside is None else [f"own {job.beside}"]
        mine = statistics.quantiles(took[executor])[0]
        for peer in (READ, *peers, *own):
            theirs = took[f"{peer} {executor}" if peer in own else peer]
            found.append({
                "goal": job.goal, "job": job.name, "shape": f"{rows}x{columns}", "tokens": tokens,
                "executor": executor, "threads": torch.get_num_threads(), "peer": peer,
                "instructions": library.instructions(), "ratio": ratio(theirs, took[executor]),
                "fraction_of_limit": ratio(took[READ], took[executor]), "microseconds": mine * 1e6,
                "gigabytes_per_second": size / mine / 1e9,
                "read_gigabytes_per_second": size / statistics.quantiles(took[READ])[0] / 1e9,
                "max_rel_error": error[executor], "bits_per_weight": size * 8 / rows / columns, "turns": turns,
                "note": "" if executor == "exact" or all(term.multiplies_bytes for term in made) else "parts run exact",
            })  # fmt: skip
    return found


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--peers", nargs="*", help="names of peers; all that are installed unless told")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "8192x2048", "1536x576"], help="rows x columns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--turns", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    peers = peers_cpu.available(options.peers)
    turns = options.turns // 4 if options.quick else options.turns
    rows: list[Row] = []
    for name in options.jobs:
        for shape in options.shapes[:1] if options.quick else options.shapes:
            for tokens in options.tokens[:1] if options.quick else options.tokens:
                out, columns = map(int, shape.split("x"))
                found = measure(JOBS[name], out, columns, tokens, turns, peers)
                parts = [f"{row['peer']} {row['ratio']:.2f}" for row in found if row["executor"] == "fast"]
                print(f"{name} {shape} {tokens}, fast: {', '.join(parts)}", file=sys.stderr)
                rows += found
                if options.json is not None:  # kept as they come
                    write(options, found, KEY)
    if options.json is None:
        write(options, rows, KEY)


if __name__ == "__main__":
    main()
