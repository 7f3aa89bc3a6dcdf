"""Whether the long suite tells a bad KV cache from a perfect one: task by task, on the demo model.

``perfect`` keeps every key and value as it is; ``bad`` turns each key into noise of its own size once the pass that
brought it is over. Both run beside the dense cache, in sessions of the default sizes, or of 512 tokens with --quick.
A task tells them apart when the whole interval of the bad one's KL lies far above that of the perfect one.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from harness import ROOT, Row, arguments, write

sys.path.insert(0, str(ROOT))  # the two caches are those of the tests

from rarefy import api
from rarefy.evaluation.candidates import Candidate
from rarefy.evaluation.long.results import LongComparison, TaskSummary, summarize
from rarefy.evaluation.long.runner import evaluate_long
from rarefy.evaluation.long.suite import POSITIONS, TASKS, LongProtocol
from rarefy.sources.texts import open_text
from tests.caches import bad_cache, perfect_cache

KEY = ("job", "mode", "peer", "protocol")
CACHES = {"perfect": perfect_cache, "bad": bad_cache}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS, POSITIONS], help="some tasks only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    sizes: dict[str, Any] = {"length": 512, "documents": 2} if options.quick else {}
    model: Any = api.load("demo", dtype="float32")
    model.to(options.device)
    tokenizer, text = api.load_tokenizer("demo"), open_text("demo", "evaluation")
    candidates = [Candidate(name, model, cache=cache) for name, cache in CACHES.items()]
    for task in options.tasks:
        protocol = LongProtocol(tasks=(task,), text=text.name, **sizes)
        found = evaluate_long(candidates, tokenizer, text.text, protocol, reference=Candidate("dense", model))
        rows = positions(found) if task == POSITIONS else answers(found)
        write(options, [{"goal": "R9", "model": "demo", **row} for row in rows], KEY)


def answers(found: LongComparison) -> list[Row]:
    """A row for each cache and way of asking."""
    rows = []
    summaries = {each.model: summarize(each, found.reference)[:-1] for each in found.candidates}
    for perfect, bad in zip(summaries["perfect"], summaries["bad"], strict=True):
        apart = _low(bad) > 10 * max(_high(perfect), 1e-4)
        for name, each in (("perfect", perfect), ("bad", bad)):
            change = each.nll_change
            rows.append(
                {
                    "job": each.task, "mode": each.mode, "peer": name, "answers": each.answers,
                    "exact": each.accuracy, "dense_exact": each.reference_accuracy, "kl": each.kl and each.kl.value,
                    "kl_low": _low(each), "kl_high": _high(each), "nll_change": change and change.value,
                    "nll_change_low": change and change.low, "nll_change_high": change and change.high,
                    "told_apart": apart, "protocol": found.candidates[0].protocol.describe(),
                }
            )  # fmt: skip
    return rows


def positions(found: LongComparison) -> list[Row]:
    """A row for each cache: its KL from the third bin on, for the first ones lie in the first pass."""
    curves = {each.model: each.positions for each in found.candidates}
    kl = {name: curve.kl[-1] for name, curve in curves.items() if curve is not None and curve.kl is not None}
    apart = kl["bad"] > 10 * max(kl["perfect"], 1e-4)
    protocol = found.candidates[0].protocol.describe()
    return [
        {"job": POSITIONS, "mode": "text", "peer": name, "kl": value, "told_apart": apart, "protocol": protocol}
        for name, value in kl.items()
    ]


def _low(summary: TaskSummary) -> float:
    return summary.kl.low if summary.kl is not None else 0.0


def _high(summary: TaskSummary) -> float:
    return summary.kl.high if summary.kl is not None else 0.0


if __name__ == "__main__":
    main()
