"""Tables of weight recipes: quality by bits on language models, encoders and ViTs; what calibration takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from tables_shared import DEMO, LAB, UNMEASURED, Rows, combined, machines, mean, measured_on, results

SHOWN = "^(rtn|gptq|awq) int[34] g128 Z$|^spqr int(3 3.95 bits|4)$|^(sparsegpt|wanda) (50%|2:4)$"
FOLDED = "SmolLM2-135M-Instruct (demo, norm gains folded into the layers that read them, jitter 0.10)"
GRIDS = r"^(rtn|gptq|awq) int[34] g(128|64|32) Z$"
# Rows of a page, on either model.
PAGES = {
    "gptq": "^(rtn|gptq) int[34] g(128|16) Z( no clip)?$|^gptq int3 g128 Z (file order|true-sequential)$",
    "awq": "^(rtn|gptq|awq) int[34] g128 Z$",
    "spqr": "^(spqr|llama.cpp) |^(rtn|gptq|awq) int[34] g128 Z$|^(rtn|gptq) int3 g16 ",
    "sparse": "^(sparsegpt|wanda) ",
    "squeeze-llm": "^squeeze_llm |^gptq (lut3 per row|int[34] per row|int[34] g128 Z)$",
    "gwq": "^gwq |^(rtn|gptq) int[34] g128 Z$",
    "afpq": "^(afpq|one scale) |^(rtn|gptq|awq) int[34] g32 Z$",
    "gqsa": "^gqsa |^sparsegpt 2:4( int4 g128 Z)?$|^gptq (int2 g32|int3 g128) Z$",
}
# Blocks of models of which a benchmark may run some, each as long as the others.
WHOLE = {"random Llama of shape 7b": 32}


def perplexity(rows: Rows) -> str:
    """The mean, and the range over seeds where it shows."""
    values = [row["perplexity"] for row in rows]
    spread = f" ({min(values):.2f}-{max(values):.2f})" if max(values) - min(values) > 0.005 else ""
    return f"{mean(rows, 'perplexity'):.2f}{spread}" if max(values) < 1e4 else "over 10,000"


def by_job(rows: Rows) -> dict[str, Rows]:
    """Rows that differ in their seed only; the calibration is part of the name where a job had several."""
    groups: dict[tuple[str, str | None], Rows] = {}
    for row in rows:
        groups.setdefault((row["job"], row["calibration"]), []).append(row)
    jobs = [job for job, _ in groups]
    return {job if jobs.count(job) == 1 else f"{job} ({data})": own for (job, data), own in groups.items()}


def weight_accuracy(rows: Rows) -> list[str]:
    """One line per recipe; with several seeds the means, and the range of perplexities."""
    observed = any(row.get("output_error") is not None for row in rows)
    columns = ["weights", "bits/weight", "error", *(["output error"] if observed else [])]
    columns += ["perplexity", "KL (nats)", "top-1", "seeds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for job, own in by_job(rows).items():
        distance = f"{mean(own, 'kl'):.4f} | {mean(own, 'top1_agreement'):.1%}" if own[0]["kl"] is not None else "- | -"
        errors = ("relative_error", "output_error")[: 1 + observed]
        shown = ["-" if own[0].get(name) is None else f"{mean(own, name):.4f}" for name in errors]
        cost = " | ".join([f"{mean(own, 'bits_per_weight'):.3f}", *shown])
        lines.append(f"| {job} | {cost} | {perplexity(own)} | {distance} | {len(own)} |")
    return lines


def briefly(rows: Rows) -> list[str]:
    """One line per recipe for README: bits, and what they cost."""
    lines = ["| weights | bits/weight | perplexity | KL (nats) | top-1 |", "|---" * 5 + "|"]
    for job, own in by_job(rows).items():
        distance = f"{mean(own, 'kl'):.3f} | {mean(own, 'top1_agreement'):.1%}" if own[0]["kl"] is not None else "- | -"
        perplexities = f"{mean(own, 'perplexity'):.2f}"
        lines.append(f"| {job} | {mean(own, 'bits_per_weight'):.3f} | {perplexities} | {distance} |")
    return lines


def side_by_side(rows: Rows) -> list[str]:
    """One line per grid, one column per recipe: perplexity and KL at the bits that the grid costs."""
    jobs = by_job(rows)
    found = [match for job in jobs if (match := re.fullmatch(r"(\w+) (int\d g\d+ [ZF])", job))]
    recipes = list(dict.fromkeys(match[1] for match in found))
    grids = sorted({match[2] for match in found}, key=lambda grid: (grid[:4], -int(re.findall(r"\d+", grid)[1])))
    lines = [f"| weights | bits/weight | {' | '.join(recipes)} |", f"|---|---|{'---|' * len(recipes)}"]
    for grid in grids:
        cells = [jobs.get(f"{recipe} {grid}") for recipe in recipes]
        bits = mean(next(own for own in cells if own), "bits_per_weight")
        shown = [f"{perplexity(own)}, KL {mean(own, 'kl'):.3f}" if own else "-" for own in cells]
        lines.append(f"| {grid} | {bits:.3f} | {' | '.join(shown)} |")
    return lines


def accuracy_table(
    only: str = "",
    model: str = DEMO,
    context: int = 2048,
    layout: Callable[[Rows], list[str]] = weight_accuracy,
    origin: Callable[[dict[str, Any]], str] = measured_on,
) -> str:
    """The rows of ``model`` whose job matches the regular expression ``only``, the dense model first."""
    data = combined("*/weight_accuracy.json")
    own = [row for row in data["rows"] if row["model"] == model and row["protocol"].startswith(f"context {context},")]
    shown = [row for row in own if re.search(only, row["job"])]
    if not shown:
        return UNMEASURED
    dense = [row for row in own if row["job"] == "dense"]
    rows = dense + sorted(
        (row for row in shown if row["job"] != "dense"),
        key=lambda row: (-row["bits_per_weight"], row["job"], row["seed"]),
    )
    data["rows"] = rows
    samples = dict.fromkeys(row["calibration"] for row in rows if row["calibration"])
    calibrated = f" calibrated on {' and on '.join(samples)};" if samples else ""
    facts = f"{model}, {rows[0]['protocol']}, {rows[0]['tokens']} predicted tokens, seeds from 0 on;{calibrated}"
    return "\n".join([*layout(rows), "", f"{facts} {origin(data)}"])


def _samples(data: dict[str, Any]) -> str:
    """What the rows that calibrate were given."""
    return " and ".join(dict.fromkeys(row["calibration"] for row in data["rows"] if row.get("calibration")))


def similarity_table() -> str:
    """STS-B by recipe, one table per device."""
    parts = []
    for data in results("*/sentence_similarity.json"):
        lines = ["| weights | bits/weight | error | output error | Spearman | cosine to dense |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in data["rows"]:
            output = row.get("output_error")
            lines.append(
                f"| {row['job']} | {row['bits_per_weight']:.3f} | {row['relative_error']:.4f} | "
                f"{'-' if output is None else f'{output:.4f}'} | {row['spearman']:.2f} | {row['cosine']:.4f} |"
            )
        first = data["rows"][0]
        facts = f"{first['model']}, {first['pairs']} test pairs of STS-B; calibrated on {_samples(data)};"
        parts.append("\n".join([*lines, "", f"{facts} {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


def map_table() -> str:
    """Maps of a vision transformer by recipe, one table per device."""
    parts = []
    for data in results("*/map_fidelity.json"):
        lines = ["| weights | bits/weight | error | output error | map error | correlation | cosine of features |"]
        lines += ["|---" * 7 + "|"]
        for row in sorted(data["rows"], key=lambda row: (-row["bits_per_weight"], row["map_error"])):
            output = row.get("output_error")
            lines.append(
                f"| {row['job']} | {row['bits_per_weight']:.3f} | {row['relative_error']:.4f} | "
                f"{'-' if output is None else f'{output:.4f}'} | {row['map_error']:.4f} | {row['correlation']:.4f} | "
                f"{row['cosine']:.4f} |"
            )
        first = data["rows"][0]
        facts = f"{first['model']}, {first['pictures']}; calibrated on {_samples(data)};"
        parts.append("\n".join([*lines, "", f"{facts} {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


def speed_table() -> str:
    """What calibration takes, one table per device."""
    parts = []
    for data in results("*/calibration_speed.json"):
        lines = [
            "| model | weights | calibration | on | seconds | a block | whole | host memory | GPU memory | speedup |",
            "|---" * 10 + "|",
        ]
        alone = {_subject(row): row for row in data["rows"] if row["processes"] == 1}
        for row in data["rows"]:
            peaks = row["peak_host_bytes"], row["peak_gpu_bytes"]
            host, gpu = ("-" if peak is None else f"{peak / 1e9:.1f} GB" for peak in peaks)
            unit = "thread" if row["device_type"] == "cpu" else "GPU"
            count = row["processes"] * (row["threads"] if unit == "thread" else 1)
            block = "-" if row["seconds_per_block"] is None else f"{row['seconds_per_block']:.2f}"
            speedup, one = "-", alone.get(_subject(row))
            if row["processes"] > 1 and one is not None:
                of_block = one["seconds_per_block"] / row["seconds_per_block"]
                speedup = f"{of_block:.2f} a block, {_whole(one) / _whole(row):.2f} whole"
            lines.append(
                f"| {row['model']}, {row['layers']} blocks | {row['job']} | {row['calibration'] or '-'} | "
                f"{count} {unit}{'s' if count > 1 else ''} | {row['seconds']:.0f} | {block} | {_whole(row):.0f} | "
                f"{host} | {gpu} | {speedup} |"
            )
        facts = "Whole: seconds for all blocks of the shape, from those that ran. Each job in processes of its own;"
        parts.append("\n".join([*lines, "", f"{facts} {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


def _subject(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows of one and of several processes have in common."""
    return tuple(row[name] for name in ("model", "layers", "job", "calibration", "device_type"))


def _whole(row: dict[str, Any]) -> float:
    """Seconds for as many blocks as the shape has; the start and the end as they were."""
    left = WHOLE.get(row["model"], row["layers"]) - row["layers"]
    return float(row["seconds"] + left * (row["seconds_per_block"] or 0))


TABLES: dict[str, Callable[[], str]] = {
    "weight-accuracy-short": lambda: accuracy_table(SHOWN, layout=briefly, origin=machines),
    "weight-accuracy-rtn": lambda: accuracy_table("^rtn "),
    "weight-accuracy-rtn-512": lambda: accuracy_table("^rtn ", context=512),
    **{name: partial(accuracy_table, rows) for name, rows in PAGES.items()},
    **{f"{name}-lab": partial(accuracy_table, rows, LAB) for name, rows in PAGES.items()},
    "grids": lambda: accuracy_table(GRIDS, layout=side_by_side),
    "grids-lab": lambda: accuracy_table(GRIDS, LAB, layout=side_by_side),
    "folded": lambda: accuracy_table("", FOLDED),
    "sentence-similarity": similarity_table,
    "maps": map_table,
    "calibration-speed": speed_table,
}
