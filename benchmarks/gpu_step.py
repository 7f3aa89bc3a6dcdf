"""What the time of a decoding step goes to on a GPU, launch by launch: Llama 3 8B's shape, random weights in code.

Launches overlap: one begins, and fetches weights, before the one before it has ended. What a launch costs is therefore
the time from the end of its forerunner to its own end; these add up to the step. ``microseconds_of_bytes`` is what
its weights would take at the bandwidth of a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gpu_decode
import torch
from graphs import bandwidth
from harness import Row, arguments, write
from torch import nn

from rarefy.decoding.build import build
from rarefy.decoding.fuse import Projects
from rarefy.decoding.link import Linked
from rarefy.decoding.program import Program
from rarefy.layers.linear import CompressedLinear

KEY = ("job", "batch", "phase")
STEPS = 8
NAMES = {
    "_embed": "embedding", "_add_norm": "norm", "_gate": "gate", "_attend": "attention",
    "rarefy_attend_token": "attention", "_pick": "choice of the token",
}  # fmt: skip
PRODUCTS = ("rarefy_linear", "rarefy_gemm")


def launches(made: gpu_decode.Ours) -> list[list[tuple[str, float]]]:
    """Name and microseconds of every launch of some steps."""
    made(STEPS)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        made(STEPS)
        torch.cuda.synchronize()
    events = [each for each in profile.profiler.kineto_results.events() if "CUDA" in str(each.device_type())]
    kernels = sorted((each.end_ns(), each.name()) for each in events if not each.name().startswith("Mem"))
    first = next(number for number, (_, name) in enumerate(kernels) if "_embed" in name)
    kernels, before = kernels[first:], kernels[first - 1][0] if first else kernels[0][0]
    found: list[list[tuple[str, float]]] = []
    inside = False  # of a step; what copies tokens before and after some is none of theirs
    for end, name in kernels:
        if "_embed" in name:
            found.append([])
        inside = inside or "_embed" in name
        if inside:
            found[-1].append((name, (end - before) / 1e3))
        inside = inside and "_pick" not in name
        before = end
    return found[1:]  # the first waited for the host


def products(made: gpu_decode.Ours) -> list[tuple[str, int]]:
    """What the products of a step are called and how many bytes of weights they read, in their order."""
    found = []
    for step in made.execute.steps(len(made.tokens)):
        product = step.product if isinstance(step, Linked) else step
        if isinstance(product, Projects):
            linears = [part.linear for part in product.parts]
            rows, columns = sum(linear.out_features for linear in linears), linears[0].in_features
            after = "" if not isinstance(step, Linked) or step.after is None else f", {type(step.after).__name__}"
            nbytes = sum(map(_nbytes, linears))
            found.append((f"{rows}x{columns}{after.replace('AddNorm', 'sum').replace('Gate', 'gate')}", nbytes))
    return found


def _nbytes(linear: nn.Linear) -> int:
    coded = isinstance(linear, CompressedLinear)
    return linear.byte_count().total if coded else linear.weight.numel() * linear.weight.itemsize


def phases(made: gpu_decode.Ours) -> dict[str, dict[str, float]]:
    """Launches, microseconds of a step and bytes of each kind of launch."""
    steps = launches(made)
    named = products(made)
    found: dict[str, dict[str, float]] = {}
    for step in steps:
        left = list(named)
        carried = 0.0
        for name, took in step:
            nbytes = 0
            if "rarefy_arrange" in name:  # the first half of the product that follows
                carried = took
                continue
            if any(each in name for each in PRODUCTS) and left:
                label, nbytes = left.pop(0)
            else:
                label = next((NAMES[each] for each in NAMES if name.startswith(each)), name.split("<")[0][:40])
            own = found.setdefault(label, {"count": 0, "microseconds": 0.0, "nbytes": 0})
            own["count"] += 1
            own["microseconds"] += took + carried
            own["nbytes"] += nbytes
            carried = 0.0
    return {label: {name: each / len(steps) for name, each in own.items()} for label, own in found.items()}


def rows_of(kind: str, program: Program, batch: int, limit: float) -> list[Row]:
    made = gpu_decode.Ours(program, batch)
    found = phases(made)
    whole = gpu_decode.milliseconds([gpu_decode.Decoder("step", lambda: made(gpu_decode.NEW), gpu_decode.NEW, 0)], 3)
    total = sum(own["microseconds"] for own in found.values())
    rows: list[Row] = []
    for label, own in found.items():
        rows.append({
            "goal": "profile", "job": kind, "batch": batch, "phase": label, "launches": round(own["count"]),
            "microseconds": round(own["microseconds"], 1), "share": round(own["microseconds"] / total, 4),
            "microseconds_of_bytes": round(own["nbytes"] / limit, 1), "max_rel_error": made.error,
            "note": f"{program.layers} layers, {gpu_decode.PROMPT} tokens before; {total:.0f} us with the profiler, "
            f"{whole['step'] * 1e3:.0f} us without; copy {limit / 1e6:.2f} TB/s",
        })  # fmt: skip
        print(f"{kind}, batch {batch}, {label}: {own['count']:.0f} launches, {own['microseconds']:.1f} us", flush=True)
    print(rows[-1]["note"], flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--layers", type=int, default=gpu_decode.SHAPE["num_hidden_layers"], help="fewer, to try out")
    parser.add_argument("--batch", default="1", help="sequences, by commas")
    parser.add_argument("--kinds", default="W4 g128,SpQR 3,SqueezeLLM 3", help="codes, by commas")
    options = parser.parse_args()
    shape: dict[str, Any] = {**gpu_decode.SHAPE, "num_hidden_layers": options.layers}
    limit = bandwidth()
    kinds: Sequence[str] = options.kinds.split(",")
    for kind in kinds:
        program = build(gpu_decode.random_model(None if kind == "bf16" else kind, shape))
        for batch in map(int, options.batch.split(",")):
            write(options, rows_of(kind, program, batch, limit), KEY)


if __name__ == "__main__":
    main()
