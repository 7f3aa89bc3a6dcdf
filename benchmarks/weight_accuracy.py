"""Accuracy of weight recipes at their achieved bits: perplexity, KL and top-1 agreement against the dense model.

Every recipe compresses the same jittered demo model (see docs/demo.md) for each seed of the jitter; the dense model
runs once per seed for all of them. The text is given (``--text wiki.test.raw``) or the demo's Wikipedia sample.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from harness import arguments, write

import rarefy
from rarefy.evaluation.candidates import Candidate, dense_sizes
from rarefy.evaluation.protocol import Protocol
from rarefy.evaluation.runner import evaluate
from rarefy.layers.manifest import Manifest
from rarefy.sources.texts import open_text
from rarefy.sources.windows import tokenize, windows

Options = dict[str, Any]

# name -> options of rtn; "F" is a float zero point (range from minimum to maximum), "Z" an integer one.
PLANS: dict[str, Options] = {
    "int8 g128 Z": {"num_bits": 8},
    "int6 g128 Z": {"num_bits": 6},
    "int5 g128 Z": {"num_bits": 5},
    "int4 g32 F": {"num_bits": 4, "group_size": 32, "zero_point": "float"},
    "int4 g32 Z": {"num_bits": 4, "group_size": 32},
    "int4 g64 Z": {"num_bits": 4, "group_size": 64},
    "int4 g128 Z": {"num_bits": 4},
    "int4 g128 Z clip": {"num_bits": 4, "clip": "mse"},
    "int4 g128 symmetric": {"num_bits": 4, "symmetric": True},
    "nf4 g64": {"format": "nf4", "group_size": 64},
    "nf4 g64 two scales": {"format": "nf4", "group_size": 64, "two_scales": True},
    "fp4 g64": {"format": "fp4", "group_size": 64},
    "lut4 per row": {"format": "lut", "num_bits": 4},
    "int3 g128 Z": {"num_bits": 3},
    "int3 g128 Z clip": {"num_bits": 3, "clip": "mse"},
    "int3 g16 F bilevel": {"num_bits": 3, "group_size": 16, "zero_point": "float", "scales": "bilevel"},
    "nf3 g64": {"format": "nf3", "group_size": 64},
    "lut3 per row": {"format": "lut", "num_bits": 3},
    "int2 g64 Z clip": {"num_bits": 2, "group_size": 64, "clip": "mse"},
    "ternary g64": {"format": "ternary", "group_size": 64},
}
QUICK = ("int4 g32 F", "int4 g32 Z", "int4 g128 Z", "int3 g128 Z")


def measure(seed: int, plans: dict[str, Options], text: str, protocol: Protocol, device: str) -> list[dict[str, Any]]:
    """Rows of one seed; models share a pass as far as memory goes."""
    name = f"demo:seed={seed}"
    tokenizer = rarefy.load_tokenizer(name)
    source = open_text(text, "evaluation")
    tokens = windows(tokenize(tokenizer, source.text), protocol.context, protocol.windows, None)
    stated = protocol.model_copy(update={"text": source.name, "form": source.form, "bos": False})
    dense = rarefy.load(name).to(device)
    errors: dict[str, float] = {}
    manifests: dict[str, Manifest] = {}

    def loader(label: str, options: Options) -> Any:
        def open_it() -> Any:
            model = rarefy.load(name).to(device)
            report = rarefy.compress(model, "rtn", options=options)
            errors[label] = sum(layer.relative_error for layer in report.layers) / len(report.layers)
            manifests[label] = model.config.quantization_config.manifest
            return model

        return open_it

    sizes = dense_sizes(dense)
    candidates = [
        Candidate(label, load=loader(label, options), resident_bytes=sizes.stored_bytes or 0)
        for label, options in plans.items()
    ]
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else None
    reference = Candidate("dense", model=dense, sizes=sizes)
    result = evaluate(candidates, tokens, stated, reference=reference, free_bytes=free)
    rows = [_row("dense", seed, result.reference, 0.0, 32.0)] if result.reference else []
    for evaluation in result.candidates:
        report = manifests[evaluation.model].report
        assert report is not None
        rows.append(_row(evaluation.model, seed, evaluation, errors[evaluation.model], report.bits_per_weight["total"]))
    return rows


def _row(label: str, seed: int, evaluation: Any, error: float, bits: float) -> dict[str, Any]:
    return {
        "job": label, "seed": seed, "bits_per_weight": round(bits, 4), "relative_error": round(error, 5),
        "perplexity": round(evaluation.perplexity, 4), "kl": None if evaluation.kl is None else round(evaluation.kl, 5),
        "top1_agreement": None if evaluation.top1_agreement is None else round(evaluation.top1_agreement, 5),
        "tokens": evaluation.tokens, "protocol": evaluation.protocol.describe(),
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--text", default="demo", help="text file, or 'demo'")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=0, help="0: the whole text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", help="regular expression of the plans to measure")
    options = parser.parse_args()
    plans = {label: PLANS[label] for label in QUICK} if options.quick else PLANS
    if options.only:
        plans = {label: plan for label, plan in plans.items() if re.search(options.only, label)}
    protocol = Protocol(context=options.context, windows=options.windows or None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        rows += measure(seed, plans, options.text, protocol, device)
        print(f"seed {seed} done", file=sys.stderr)
    write(options, rows, model="SmolLM2-135M-Instruct (demo, jitter 0.10)")


if __name__ == "__main__":
    main()
