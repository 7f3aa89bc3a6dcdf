"""Does a compressed sentence encoder still rank pairs as people do? Spearman correlation on STS-B's test pairs.

Sentences are embedded by the mean over their tokens, pairs judged by cosine, and the ranking compared with the scores
people gave. ``cosine`` is the mean cosine between a sentence's embeddings before and after compression. The encoder is
any folder of a BERT-like model, such as all-MiniLM-L6-v2, whose weights are true float32; the pairs are the STS
benchmark's tab-separated files. Recipes calibrate on sentences of the training pairs.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import Row, arguments, write
from plans import PERCENT, Plan, chosen, float_code, groups, integers, spared, tables
from scipy.stats import spearmanr
from torch import Tensor

import rarefy
from rarefy.core.errors import OptionError, RarefyError

KEY = ("model", "job", "calibration", "tokens")
BATCH = 64  # sentences of nearly equal length
PLANS = [
    *(integers(recipe, bits, 128) for bits in (4, 3) for recipe in ("rtn", "gptq", "awq")),
    Plan("spqr int4", "spqr", {"num_bits": 4}),
    Plan("spqr int3", "spqr", {"num_bits": 3}),
    *(plan for bits in (4, 3) for plan in (tables(bits), tables(bits, "0.45%", **PERCENT))),
    *(spared("gradient", bits) for bits in (4, 3)),
    *(float_code(f"nf{bits}", 32, "gptq", scales) for bits in (4, 3) for scales in (2, 1)),
    groups(0.3),
]
QUICK = ("rtn int4 g128 Z", "gptq int4 g128 Z", "spqr int4")


def read_pairs(path: Path) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and scores of an STS benchmark file: tab-separated, the score in the fifth
    column, the sentences in the two after it. Raises OptionError naming a line that is different."""
    first, second, scores = [], [], []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        fields = line.split("\t")
        try:
            scores.append(float(fields[4]))
            first.append(fields[5])
            second.append(fields[6])
        except (IndexError, ValueError):
            raise OptionError(f"Line {number} of '{path}' is not a pair with a score; name an STS file.") from None
    return first, second, scores


def batches(tokenizer: Any, sentences: list[str], longest: int) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Inputs of ``BATCH`` sentences each, short ones first so that little is padded, with the sentences' positions."""
    encoded = tokenizer(sentences, truncation=True, max_length=longest)["input_ids"]
    order = sorted(range(len(sentences)), key=lambda index: len(encoded[index]))
    found = []
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        padded = tokenizer.pad({"input_ids": [encoded[index] for index in part]}, return_tensors="pt")
        found.append((part, {name: padded[name] for name in ("input_ids", "attention_mask")}))
    return found


@torch.inference_mode()
def embed(model: Any, inputs: list[tuple[list[int], dict[str, Tensor]]]) -> Tensor:
    """Embeddings of length 1, float32 ``[sentences, width]``: the mean over each sentence's tokens."""
    parts, order = [], []
    for positions, batch in inputs:
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state.float()
        parts.append((hidden * mask).sum(1) / mask.sum(1))
        order += positions
    whole = torch.nn.functional.normalize(torch.cat(parts), dim=1)
    return whole[torch.tensor(order).argsort()]


def measure(options: Namespace, plans: list[Plan], work: Path) -> list[str]:
    """Write a row for the dense encoder and each plan; returns the plans that failed."""
    tokenizer, name = rarefy.load_tokenizer(str(options.model)), options.name or options.model.name
    first, second, scores = read_pairs(options.test)
    inputs = batches(tokenizer, first + second, options.tokens)
    one, other, _ = read_pairs(options.train)
    sentences = (one + other)[:: options.every]
    data = [batch for _, batch in batches(tokenizer, sentences, options.tokens)]
    calibration = f"{len(sentences)} sentences of {options.train.name}"
    facts: Row = {"model": name, "pairs": len(scores), "tokens": options.tokens}
    dense = embed(rarefy.load(options.model, dtype="float32"), inputs)

    def judged(embeddings: Tensor) -> Row:
        left, right = embeddings.chunk(2)
        found = float(spearmanr((left * right).sum(1).numpy(), scores).statistic)
        return {"spearman": round(100 * found, 3), "cosine": round(float((embeddings * dense).sum(1).mean()), 5)}

    rows = [{**facts, "job": "dense", "bits_per_weight": 32.0, "relative_error": 0.0, **judged(dense)}]
    failed = []
    for plan in plans:
        start = time.perf_counter()
        try:
            calibrates = plan.calibrates
            report = rarefy.compress(
                str(options.model), plan.recipe, options=plan.options, out=work, overwrite=True,
                data=data if calibrates else None,
            )  # fmt: skip
        except RarefyError as failure:
            failed.append(f"{plan.job} ({failure})")
            continue
        outputs = [layer.output_error for layer in report.layers if layer.output_error is not None]
        seconds = time.perf_counter() - start
        rows.append({
            **facts, "job": plan.job, "bits_per_weight": round(report.bits_per_weight["total"], 4),
            "relative_error": round(statistics.fmean(layer.relative_error for layer in report.layers), 5),
            "output_error": round(statistics.fmean(outputs), 5) if outputs else None,
            **judged(embed(rarefy.load(work, dtype="float32"), inputs)),
            "calibration": calibration if calibrates else None, "seconds": round(seconds, 1),
        })  # fmt: skip
        print(" ".join(f"{key}={rows[-1][key]}" for key in ("job", "bits_per_weight", "spearman")), file=sys.stderr)
    write(options, rows, KEY)
    return failed


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--name", help="what tables call it (default: the folder's name)")
    parser.add_argument("--test", type=Path, required=True, help="sts-test.csv")
    parser.add_argument("--train", type=Path, required=True, help="sts-train.csv")
    parser.add_argument("--every", type=int, default=5, help="calibrate on every n-th training sentence")
    parser.add_argument("--tokens", type=int, default=128, help="longest sentence")
    parser.add_argument("--only", help="regular expression of the jobs to measure")
    options = parser.parse_args()
    plans = [plan for plan in PLANS if not options.quick or plan.job in QUICK]
    with TemporaryDirectory() as work:
        failed = measure(options, chosen(plans, options.only), Path(work) / "compressed")
    if failed:
        raise SystemExit("Not measured:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
