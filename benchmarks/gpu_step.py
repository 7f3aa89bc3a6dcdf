"""Where the time of a step in one launch goes, by the cycles that its blocks note themselves (``Resident.timed``).

Every block says when it began each phase, when it had a product's input (normed, in shared memory) and when it was
done; what follows until the next phase is waiting for other blocks. Weights are on their way all the while, so a phase
has no limit of its own: ``microseconds_of_bytes`` is what its weights would take at the bandwidth of a copy, and only
the sum over phases has to be longer. Cycles become microseconds by the time that a whole step takes.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_decode import PROMPT, SHAPE, Ours, captured_anew_of, random_model
from graphs import bandwidth
from harness import Row, arguments, write
from torch import Tensor

from rarefy.decoding.build import build
from rarefy.decoding.fuse import Attention
from rarefy.decoding.resident import Product, ResidentStep

KEY = ("job", "phase")


def label(phase: Product | Attention) -> str:
    if isinstance(phase, Attention):
        return "attention"
    said = phase.weights.phase()
    around = [*(["norm"] if phase.norm else []), f"{said['rows']}x{said['columns']}"]
    around += ["gate"] if phase.gate else ["sum"] if phase.add else []
    return ", ".join(around)


def nbytes(phase: Product | Attention) -> int:
    return 0 if isinstance(phase, Attention) else sum(each.nbytes for each in phase.weights.tensors.values())


def seconds_of_phases(plan: ResidentStep, times: Tensor, step: float) -> list[dict[str, Any]]:
    """For each kind of phase microseconds of all of them; ``times [phases, blocks, 3]``, ``step`` in microseconds."""
    cycles = times.cpu().double()
    begun, given, done = (cycles - cycles[0, :, :1].unsqueeze(0)).unbind(-1)  # clocks differ between multiprocessors
    to_microseconds = step / float(done[-1].max())
    after = torch.cat([begun[1:], done[-1:]])
    found: dict[str, dict[str, Any]] = {}
    for number, phase in enumerate(plan.plan.phases):
        own = found.setdefault(label(phase), {"count": 0, "input": 0.0, "work": 0.0, "waiting": 0.0, "nbytes": 0})
        start = begun[number] if isinstance(phase, Attention) else given[number]
        for name, took in (
            ("input", start - begun[number]), ("work", done[number] - start), ("waiting", after[number] - done[number])
        ):
            own[name] += float(took.mean()) * to_microseconds
        own["count"] += 1
        own["nbytes"] += nbytes(phase)
    return [{"phase": name, **numbers} for name, numbers in found.items()]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--kinds", default="W4 g128", help="codes, by commas")
    options = parser.parse_args()
    copy = bandwidth()
    rows: list[Row] = []
    for kind in options.kinds.split(","):
        ours = Ours(build(random_model(kind, {**SHAPE, "num_hidden_layers": options.layers})), 1)
        step = captured_anew_of(ours) * 1e3
        at, plan = ours.execute._steps[1], ours.execute._resident
        assert at.stays is not None and plan is not None
        times = at.stays.timed()
        at.graphs.clear()
        ours(4)
        torch.cuda.synchronize()
        for phase in seconds_of_phases(plan, times, step):
            limit = phase.pop("nbytes") / copy
            taken = sum(phase[name] for name in ("input", "work", "waiting"))
            rows.append({
                "goal": "profile", "job": kind, **phase, "microseconds": round(taken, 2),
                "microseconds_of_bytes": round(limit, 2), "share": round(taken / step, 4),
                "step_microseconds": round(step, 1),
                "note": f"{options.layers} layers, {PROMPT} tokens before; copy {copy / 1e6:.2f} TB/s",
            })  # fmt: skip
            print(rows[-1], flush=True)
    write(options, rows, KEY)


if __name__ == "__main__":
    main()
