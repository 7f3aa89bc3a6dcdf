"""Accuracy of weight recipes at their achieved bits: perplexity, KL and top-1 agreement against the dense model.

Every recipe compresses the same models: ``demo`` and its harder variant ``folded`` with a jitter for each seed (see
docs/demo.md), or a folder. The seed also draws the calibration sample. The dense model runs once per seed for all
recipes. A recipe that fails is named at the end, and the others are measured all the same.

Rows are known by model, job, seed, protocol and calibration. With ``--json`` an interrupted run goes on where it was:
rows of the same commit are not measured again, and with ``--work-dir`` no model is compressed twice.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import Row, arguments, commit, key_of, read, write
from plans import GRIDS, QUICK, RECIPES, WEIGHT_RECIPES_I, Plan, chosen
from subjects import about, calibration_samples, evaluation_windows, open_subject, refuse_leak

import rarefy
from rarefy.calibration.report import CompressionReport
from rarefy.calibration.samples import Samples
from rarefy.core.errors import RarefyError
from rarefy.evaluation.candidates import Candidate
from rarefy.evaluation.protocol import Protocol
from rarefy.evaluation.results import Evaluation
from rarefy.evaluation.runner import evaluate
from rarefy.layers.swap import compressed, restore_

KEY = ("model", "job", "seed", "protocol", "calibration")


def measure(model: str, seed: int, plans: list[Plan], options: Namespace, work: Path, deadline: float) -> list[str]:
    """Write the rows of one model and seed; returns the jobs that failed or for which no time was left."""
    folder, dense_bits = open_subject(model, seed)
    tokenizer = rarefy.load_tokenizer(str(folder))
    protocol = Protocol(context=options.context, windows=options.windows or None, dtype="float32")
    tokens, protocol = evaluation_windows(options.text, tokenizer, protocol)
    samples = calibration_samples(options.calibration, tokenizer, options.samples, options.seq_len, seed)
    refuse_leak(tokens, samples)
    rows = {(about(model), plan.job, seed, protocol.describe(), _data(plan, samples)): plan for plan in plans}
    left = [plan for key, plan in rows.items() if key not in _done(options.json)]
    undone: list[str] = []
    reports: dict[str, tuple[Path, CompressionReport]] = {}
    for plan in left:
        if time.monotonic() > deadline:
            undone.append(f"{plan.job} (no time left)")
            continue
        try:
            reports[plan.job] = _compressed(folder, plan, samples, seed, work)
        except RarefyError as failure:
            undone.append(f"{plan.job} ({failure})")
        print(f"{model} seed {seed}: {plan.job}", file=sys.stderr)
    if not reports:
        return undone
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * 32 // dense_bits

    def candidate(name: str, place: Path) -> Candidate:
        def open_it() -> Any:
            model: Any = rarefy.load(place, dtype="float32")
            model.to(device)
            # A GPU has no kernels for float32, and decoding weights for each batch takes longer than multiplying them.
            for site, _ in list(compressed(model)) if device == "cuda" else ():
                restore_(model, site)
            return model

        return Candidate(name, load=open_it, resident_bytes=size)

    free = torch.cuda.mem_get_info()[0] if device == "cuda" else None
    candidates = [candidate(job, place) for job, (place, _) in reports.items()]
    dense = candidate("dense", folder)
    result = evaluate(candidates, tokens, protocol, reference=dense, free_bytes=free)
    assert result.reference is not None
    measured = [_row(result.reference, None, {"bits_per_weight": float(dense_bits), "relative_error": 0.0})]
    by_job = {plan.job: plan for plan in left}
    for evaluation in result.candidates:
        data = _data(by_job[evaluation.model], samples)
        measured.append(_row(evaluation, data, _costs(reports[evaluation.model][1])))
    for row in measured:
        shown = ("job", "bits_per_weight", "perplexity", "kl")
        print(" ".join(f"{name}={row[name]}" for name in shown), file=sys.stderr)
    write(options, [{"model": about(model), "seed": seed, **row} for row in measured], KEY)
    return undone


def _done(path: Path | None) -> set[tuple[object, ...]]:
    """Keys of the rows in a result file that this very commit measured."""
    here = commit()
    rows = [] if here.endswith("-dirty") else read(path)["rows"]
    return {key_of(row, KEY) for row in rows if row["commit"] == here}


def _data(plan: Plan, samples: Samples) -> str | None:
    """What a plan calibrates on, in words."""
    return samples.describe() if plan.calibrates else None


def _usable(plans: list[Plan]) -> tuple[list[Plan], list[str]]:
    """The plans whose recipe takes their options, and what is wrong with the others."""
    good, bad = [], []
    for plan in plans:
        try:
            _ = plan.calibrates
        except RarefyError as failure:
            bad.append(f"{plan.job} ({failure})")
        else:
            good.append(plan)
    return good, bad


def _compressed(folder: Path, plan: Plan, samples: Samples, seed: int, work: Path) -> tuple[Path, CompressionReport]:
    """The model compressed by ``plan``, made now unless ``work`` has it from the same commit, data and options."""
    data = samples if plan.calibrates else None
    identity = [commit(), folder.name, plan.recipe, plan.options, data.identity() if data else None]
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    out, record = work / name, work / f"{name}.json"
    if record.is_file():
        return out, CompressionReport.model_validate_json(record.read_text("utf-8"))
    report = rarefy.compress(
        str(folder), plan.recipe, options=plan.options, out=out, data=data, seed=seed, overwrite=True
    )
    record.write_text(report.model_dump_json(), "utf-8")
    return out, report


def _costs(report: CompressionReport) -> Row:
    """What a compression achieved; errors are means over layers."""
    outputs = [layer.output_error for layer in report.layers if layer.output_error is not None]
    return {
        "bits_per_weight": round(report.bits_per_weight["total"], 4),
        "relative_error": round(statistics.fmean(layer.relative_error for layer in report.layers), 5),
        "output_error": round(statistics.fmean(outputs), 5) if outputs else None,
        "seconds": round(report.seconds, 1),
        "fallbacks": len(report.fallbacks),
    }


def _row(evaluation: Evaluation, data: str | None, costs: Row) -> Row:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 5)

    return {
        "job": evaluation.model, **costs, "perplexity": round(evaluation.perplexity, 4), "kl": rounded(evaluation.kl),
        "top1_agreement": rounded(evaluation.top1_agreement), "tokens": evaluation.tokens,
        "protocol": evaluation.protocol.describe(), "calibration": data,
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=["demo"], help="demo, folded, or model folders")
    parser.add_argument("--text", nargs="+", default=["demo"], help="text files to measure on, or 'demo'")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=0, help="of each text, from its start; 0: the whole text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the jitter and of the calibration sample")
    parser.add_argument("--calibration", default="demo", help="text file to calibrate on, or 'demo'")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--grids", action="store_true", help="plain rounding on other grids, not the recipes")
    parser.add_argument("--weights-1", action="store_true", help="tables, outliers, two scales and groups instead")
    parser.add_argument("--only", help="regular expression of the jobs to measure")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="compress nothing more after so many")
    parser.add_argument("--work-dir", type=Path, help="keep compressed models here")
    options = parser.parse_args()
    listed = WEIGHT_RECIPES_I if options.weights_1 else GRIDS if options.grids else RECIPES
    plans = chosen(QUICK if options.quick else listed, options.only)
    torch.backends.cuda.matmul.allow_tf32 = False
    deadline = time.monotonic() + 60 * options.minutes
    plans, undone = _usable(plans)
    with TemporaryDirectory() as scratch:
        work = options.work_dir or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for model in options.models:
            for seed in options.seeds:
                failed = measure(model, seed, plans, options, work, deadline)
                undone += [f"{model} seed {seed}: {job}" for job in failed]
    if undone:
        raise SystemExit("Not measured:\n" + "\n".join(undone))


if __name__ == "__main__":
    main()
