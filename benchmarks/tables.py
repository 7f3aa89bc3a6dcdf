"""Fills the tables of README and docs from committed results and from the code, so that no number is typed.

    python benchmarks/tables.py          rewrite them
    python benchmarks/tables.py --check  fail if one is out of date

A block starts with ``<!-- table: NAME -->`` and ends with ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHOWN = "^(rtn|gptq|awq) int[34] g128 Z$|^spqr int(3 3.95 bits|4)$|^(sparsegpt|wanda) (50%|2:4)$"
DEMO = "SmolLM2-135M-Instruct (demo, jitter 0.10)"
FOLDED = "SmolLM2-135M-Instruct (demo, norm gains folded into the layers that read them, jitter 0.10)"
LAB = "lab-29m"
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
UNMEASURED = "*No measurement of this is committed yet.*"
Rows = list[dict[str, Any]]


def mean(rows: Rows, key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


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


def results(pattern: str) -> list[dict[str, Any]]:
    """The committed result files whose path matches, one of each device."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "docs" / "results").glob(pattern))]
    for data in found:
        data["rows"] = [{"commit": data["commit"], **row} for row in data["rows"]]
    return found


def combined(pattern: str) -> dict[str, Any]:
    """Results of several devices as those of one, for numbers that hardly depend on it; what was measured on two
    counts once."""
    found = results(pattern)
    rows = {tuple(row.get(name) for name in data["key"]): (row, data) for data in found for row in data["rows"]}
    for row, data in rows.values():
        row["device"], row["torch"] = data["device"], data["versions"]["torch"]
    return {**found[0], "rows": [row for row, _ in rows.values()]}


def measured_on(data: dict[str, Any]) -> str:
    devices = " and ".join(sorted({row.get("device", data["device"]) for row in data["rows"]}))
    versions = " and ".join(sorted({row.get("torch", data["versions"]["torch"]) for row in data["rows"]}))
    return f"measured on {devices}, torch {versions}. {provenance(data['rows'])}"


def provenance(rows: list[dict[str, Any]]) -> str:
    """Which commits the rows were measured at; a row that does not know its commit is counted as such."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["commit"]] = counts.get(row["commit"], 0) + 1
    named = [f"{count} at {commit}" for commit, count in counts.items() if commit != "unknown"]
    unnamed = [f"{counts['unknown']} from a work tree that no commit names"] if "unknown" in counts else []
    return f"Of {len(rows)} measurements, {' and '.join(named + unnamed)}."


def accuracy_table(
    only: str = "", model: str = DEMO, context: int = 2048, layout: Callable[[Rows], list[str]] = weight_accuracy
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
    return "\n".join([*layout(rows), "", f"{facts} {measured_on(data)}"])


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
        samples = " and ".join(dict.fromkeys(row["calibration"] for row in data["rows"] if row.get("calibration")))
        facts = f"{first['model']}, {first['pairs']} test pairs of STS-B; calibrated on {samples};"
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
        samples = " and ".join(dict.fromkeys(row["calibration"] for row in data["rows"] if row.get("calibration")))
        facts = f"{first['model']}, {first['pictures']}; calibrated on {samples};"
        parts.append("\n".join([*lines, "", f"{facts} {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


def speed_table() -> str:
    """What calibration takes, one table per device."""
    parts = []
    for data in results("*/calibration_speed.json"):
        lines = [
            "| model | weights | calibration | on | minutes | s/block | whole | host memory | GPU memory | speedup |",
            "|---" * 10 + "|",
        ]
        for row in data["rows"]:
            gpu = "-" if row["peak_gpu_bytes"] is None else f"{row['peak_gpu_bytes'] / 1e9:.1f} GB"
            unit = "thread" if row["device_type"] == "cpu" else "GPU"
            count = row["processes"] * (row["threads"] if unit == "thread" else 1)
            block = "-" if row["seconds_per_block"] is None else f"{row['seconds_per_block']:.1f}"
            left = WHOLE.get(row["model"], row["layers"]) - row["layers"]
            whole = (row["seconds"] + left * (row["seconds_per_block"] or 0)) / 60
            lines.append(
                f"| {row['model']}, {row['layers']} blocks | {row['job']} | {row['calibration'] or '-'} | "
                f"{count} {unit}{'s' if count > 1 else ''} | {row['seconds'] / 60:.1f} | {block} | {whole:.1f} | "
                f"{row['peak_host_bytes'] / 1e9:.1f} GB | {gpu} | {row.get('ratio', '-')} |"
            )
        facts = "Whole: minutes for all blocks of the shape, from those that ran. Each job in processes of its own;"
        parts.append("\n".join([*lines, "", f"{facts} {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


def cpu_decode_table() -> str:
    """Decoding beside peers, one table per device and model."""
    parts = []
    for data in results("*/cpu_decode.json"):
        for random in (False, True):
            rows = [row for row in data["rows"] if row["quality"].startswith("random weights") == random]
            if not rows:
                continue
            head = ("goal", "job", "peer", "bits", "peer's bits", "peer's time / ours", "of streaming read", "measured")
            lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            for row in rows:
                bits, theirs = (
                    "-" if row.get(name) is None else f"{row[name]:.2f}"
                    for name in ("bits_per_weight", "peer_bits_per_weight")
                )
                share = "-" if row.get("fraction_of_limit") is None else f"{row['fraction_of_limit']:.0%}"
                where = f"{row['goal']} | {row['job']} | {row['peer']} | {bits} | {theirs}"
                lines.append(f"| {where} | {row['ratio']:.2f} | {share} | {row['note']} |")
            model = "Llamas with random weights" if random else f"{DEMO}; {rows[0]['quality']}"
            facts = f"{model}; bits of all weights that a token reads, head included; {rows[0]['load']}."
            measured = measured_on({**data, "rows": rows})
            parts.append("\n".join([*lines, "", f"{facts} All in one process and in turns; {measured}"]))
    return "\n\n".join(parts) or UNMEASURED


def cpu_layer_table() -> str:
    """Single layers for one token beside peers, one table for each device, shape, instruction set and executor."""
    parts = []
    for data in results("*/cpu_gemv.json"):
        kinds: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
        for row in data["rows"]:
            if row["tokens"] == 1 and row["threads"] == 1:
                kind = tuple(row[name] for name in ("shape", "instructions", "executor"))
                kinds.setdefault(kind, {}).setdefault(row["job"], {})[row["peer"]] = row
        for (shape, instructions, executor), jobs in kinds.items():
            known = {peer: None for rows in jobs.values() for peer in rows}
            peers = [peer for peer in known if peer != "streaming read" and not peer.startswith("own ")]
            head = ("weight", "bits", "us", "of streaming read", *peers, "own")
            lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            for job, rows in jobs.items():
                row = next(iter(rows.values()))
                ratios = [f"{rows[peer]['ratio']:.2f}" if peer in rows else "-" for peer in peers]
                own = [f"{found['ratio']:.2f} of {name[4:]}" for name, found in rows.items() if name.startswith("own ")]
                cells = [job, f"{row['bits_per_weight']:.2f}", f"{row['microseconds']:.0f}"]
                cells += [f"{row['fraction_of_limit']:.0%}", *ratios, *(own or ["-"])]
                lines.append(f"| {' | '.join(cells)} |")
            measured = measured_on({**data, "rows": [row for rows in jobs.values() for row in rows.values()]})
            facts = f"{shape}, one token, one thread, {instructions}, `{executor}`; peers: their time / ours."
            parts.append("\n".join([*lines, "", f"{facts} {measured}"]))
    return "\n\n".join(parts) or UNMEASURED


def cache_table(model: str, only: str = "") -> str:
    """KV caches of a model whose names match, one table for each device, regime and context."""
    parts = []
    for data in results("*/kv_accuracy.json"):
        own = [row for row in data["rows"] if row["model"] == model and re.search(only, row["cache"])]
        for protocol in dict.fromkeys(row["protocol"] for row in own):
            rows = [row for row in own if row["protocol"] == protocol]
            lines = ["| cache | bits | nats above dense | 95% interval | KL | top-1 |", "|---|---|---|---|---|---|"]
            for row in sorted(rows, key=lambda row: -row["bits_per_weight"]):
                lines.append(
                    f"| {row['cache']} | {row['bits_per_weight']:.3f} | {row['gap']:+.4f} | "
                    f"{row['gap_low']:+.4f} .. {row['gap_high']:+.4f} | {row['kl']:.4f} | {row['top1_agreement']:.1%} |"
                )
            facts = f"{model}, {protocol}, {rows[0]['tokens']} predicted tokens, dense {rows[0]['dense_nll']:.4f} nats;"
            parts.append("\n".join([*lines, "", f"{facts} {measured_on({**data, 'rows': rows})}"]))
    return "\n\n".join(parts) or UNMEASURED


def decode_table() -> str:
    """Attention of one token over coded caches, one table for each device."""
    parts = []
    for data in results("*/gpu_kv_decode.json"):
        lines = ["| cache | tokens | bits | us | times torch bf16 | times fp8 | of the byte limit |", "|---" * 7 + "|"]
        for row in data["rows"]:
            lines.append(
                f"| {row['job'].removeprefix('decode attention, ')} | {row['tokens']:,} | "
                f"{row['bits_per_weight']:.2f} | {row['microseconds']:.0f} | {row['ratio']:.2f} | "
                f"{row['ratio_to_fp8']:.2f} | {row['fraction_of_limit']:.2f} |"
            )
        parts.append("\n".join([*lines, "", measured_on(data)]))
    return "\n\n".join(parts) or UNMEASURED


def gpu_decode_table() -> str:
    """Whole-model decoding on GPUs, one table for each device."""
    parts = []
    for data in results("*/gpu_decode.json"):
        lines = ["| weights | batch | tokens/s | of the byte limit | peer | peer's time / ours |", "|---" * 6 + "|"]
        for row in data["rows"]:
            if row["job"] != row["peer"]:
                weights = f"{row['job']}, {row['bits_per_weight']:.2f} bits"
                speed = f"{row['tokens_per_second']:,.0f} | {row['fraction_of_limit']:.2f}"
                lines.append(f"| {weights} | {row['batch']} | {speed} | {row['peer']} | {row['ratio']:.2f} |")
        parts.append("\n".join([*lines, "", f"{data['rows'][0]['note']}; {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


def linear_table() -> str:
    """Single layers in code on GPUs, one table for each device."""
    parts = []
    for data in results("*/gpu_linear.json"):
        names = ("weights", "shape", "tokens", "us", "of the limit", "times bf16", "times the best peer")
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for row in sorted(data["rows"], key=lambda row: (row["rows"], row["columns"], row["job"], row["tokens"])):
            lines.append(
                f"| {row['job']} | {row['rows']}x{row['columns']} | {row['tokens']} | {row['microseconds']:.1f} | "
                f"{row['fraction_of_limit']:.2f} | {row.get('ratio_to_bf16', '-')} | {row['ratio']} ({row['peer']}) |"
            )
        parts.append("\n".join([*lines, "", measured_on(data)]))
    return "\n\n".join(parts) or UNMEASURED


def attention_rows(kind: str, model: str, **wanted: Any) -> list[tuple[dict[str, Any], Rows]]:
    """Rows of one kind of ``attention_accuracy.json`` for a model, by device."""
    found = []
    for data in results("*/attention_accuracy.json"):
        rows = [row for row in data["rows"] if row["kind"] == kind and row["model"].startswith(model)]
        rows = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
        if rows:
            found.append((data, rows))
    return found


def plan_name(row: dict[str, Any]) -> str:
    """As ``rarefy eval --attention`` has it."""
    return re.sub(r"sale {'budget': ([\d.]+)}", r"sale:budget=\1", str(row["job"]))


def attention_facts(data: dict[str, Any], rows: Rows) -> str:
    first = rows[0]
    return f"{first['model']}, {first['context']} tokens, {first['text']}; {measured_on({**data, 'rows': rows})}"


def attention_losses(model: str, phase: str, equal: bool = True) -> str:
    """What plans cost, best first at each density: those that were given a density, or those that found their own with
    controls beside them."""
    parts = []
    for data, every in attention_rows(phase, model):
        found = [row for row in every if ("nominal" in row) == equal]
        if not found:
            continue
        rows = sorted(found, key=lambda row: (round(row["density"], 2), row["kl"]))
        lines = ["| plan | density | nats above dense | perplexity | KL | top-1 |", "|---" * 6 + "|"]
        for row in rows:
            lines.append(
                f"| {plan_name(row)} | {row['density']:.1%} | {row['gap']:+.4f} | {row['perplexity_cost']:+.1%} | "
                f"{row['kl']:.4f} | {row['top1_agreement']:.1%} |"
            )
        parts.append("\n".join([*lines, "", f"Dense: {rows[0]['dense_nll']:.4f} nats. {attention_facts(data, rows)}"]))
    return "\n\n".join(parts) or UNMEASURED


def attention_choices(model: str) -> str:
    """What plans keep of attention, layer by layer."""
    parts = []
    for data, found in attention_rows("choice", model):
        rows = sorted(found, key=lambda row: (round(row["density"], 2), -row["recall"]))
        lines = ["| plan | density | mass kept | most that as few could keep | output error |", "|---" * 5 + "|"]
        for row in rows:
            lines.append(
                f"| {plan_name(row)} | {row['density']:.1%} | {row['recall']:.1%} | {row['best']:.1%} | "
                f"{row['error']:.3f} |"
            )
        parts.append("\n".join([*lines, "", attention_facts(data, rows)]))
    return "\n\n".join(parts) or UNMEASURED


def attention_answers(model: str, phase: str) -> str:
    """Answers found in long contexts, a column for each task."""
    parts = []
    for data, rows in attention_rows("retrieval", model, phase=phase):
        # What the dense model cannot answer tells nothing.
        able = {row["task"]: row["accuracy"] for row in rows if row["job"] == "dense"}
        rows = [row for row in rows if able.get(row["task"], 1.0) >= 0.2]
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        lines = [f"| plan | density | {' | '.join(tasks)} |", "|---" * (2 + len(tasks)) + "|"]
        jobs = dict.fromkeys(row["job"] for row in rows)
        own = {job: {row["task"]: row for row in rows if row["job"] == job} for job in jobs}
        for job in sorted(jobs, key=lambda job: -statistics.fmean(row["accuracy"] for row in own[job].values())):
            cells = [f"{own[job][task]['accuracy']:.0%}" if task in own[job] else "-" for task in tasks]
            lines.append(f"| {job} | {mean(list(own[job].values()), 'density'):.1%} | {' | '.join(cells)} |")
        count = min(row["answers"] for row in rows)
        told = f"{count} answers or more of each task that the dense model answers at all."
        parts.append("\n".join([*lines, "", f"{told} {attention_facts(data, rows)}"]))
    return "\n\n".join(parts) or UNMEASURED


def attention_budgets(model: str) -> str:
    """How calibrated thresholds keep their budget on text they were not calibrated on."""
    parts = []
    for data, rows in attention_rows("budget", model):
        lines = ["| budget | mean error of a head | worst | within | within half as much again |", "|---" * 5 + "|"]
        for row in sorted(rows, key=lambda row: row["budget"]):
            lines.append(
                f"| {row['budget']:g} | {row['mean_error']:.4f} | {row['worst_error']:.3f} | {row['within']:.1%} | "
                f"{row['within_half_more']:.1%} |"
            )
        parts.append("\n".join([*lines, "", attention_facts(data, rows)]))
    return "\n\n".join(parts) or UNMEASURED


def sparse_training_table() -> str:
    parts = []
    for data in results("*/sparse_training.json"):
        lines = ["| trained | attends | density | nats | beside dense trained densely |", "|---" * 5 + "|"]
        for row in data["rows"]:
            lines.append(
                f"| {row['job']} | {row['attention']} | {row['measured_density']:.1%} | {row['nll']:.4f} | "
                f"{row['gap']:+.4f} |"
            )
        first = next(row for row in data["rows"] if row["steps"])
        facts = f"{first['model']}, {first['steps']} steps of {first['batch']} x {first['context']} tokens;"
        parts.append("\n".join([*lines, "", f"{facts} {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


def estimator_table() -> str:
    """Plans and their estimators in milliseconds, one table per device."""
    parts = []
    for data in results("*/gpu_estimators.json"):
        lines = ["| plan | tokens | estimate ms | of dense | execute ms | whole ms | peer | times the peer |"]
        lines.append("|---" * 8 + "|")
        for row in sorted(data["rows"], key=lambda row: (row["job"], row["tokens"], row["peer"])):
            execute = row["execute_milliseconds"]
            lines.append(
                f"| {row['job']} | {row['tokens']:,} | {row['estimate_milliseconds']:.2f} | {row['share']:.1%} | "
                f"{'-' if execute is None else f'{execute:.2f}'} | {row['milliseconds']:.2f} | {row['peer']} | "
                f"{row['ratio']:.2f} |"
            )
        parts.append(
            "\n".join([*lines, "", f"Causal, 32 query heads over 8 KV heads of 128, bf16; {measured_on(data)}"])
        )
    return "\n\n".join(parts) or UNMEASURED


def plan_table(goal: str) -> str:
    """Sparse attention beside dense kernels: whole plans (``prefill``), executors alone, or ``decode``."""
    parts = []
    for data in results("*/gpu_attention.json"):
        rows = [row for row in data["rows"] if row["goal"] == goal]
        if not rows:
            continue
        if goal == "prefill":
            peers = list(dict.fromkeys(row["peer"] for row in rows))
            heads = ["tokens", "plan", "density", "ms", "estimating", "and selecting"]
            lines = [f"| {' | '.join([*heads, *(f'times {peer}' for peer in peers)])} |", "|---" * 10 + "|"]
            lines[1] = "|---" * (len(heads) + len(peers)) + "|"
            for tokens, job in sorted({(row["tokens"], row["job"]) for row in rows}):
                own = {row["peer"]: row for row in rows if (row["tokens"], row["job"]) == (tokens, job)}
                first = own.get("dense cudnn") or next(iter(own.values()))
                ratios = " | ".join(f"{own[peer]['ratio']:.2f}" if peer in own else "-" for peer in peers)
                lines.append(
                    f"| {tokens:,} | {job.removeprefix('plan, ')} | {first['measured_density']:.3f} | "
                    f"{first['milliseconds']:.2f} | {first['estimator_share']:.1%} | "
                    f"{first['estimator_and_selection_share']:.1%} | {ratios} |"
                )
        elif goal == "execution":
            lines = ["| tokens | executor | density | ms | times cuDNN | of its rate |", "|---" * 6 + "|"]
            for row in sorted(rows, key=lambda row: (row["tokens"], row["job"], -row["measured_density"])):
                lines.append(
                    f"| {row['tokens']:,} | {row['job'].rpartition(', ')[2]} | {row['measured_density']:.3f} | "
                    f"{row['milliseconds']:.2f} | {row['ratio']:.2f} | {row['kept_rate']:.2f} |"
                )
        else:
            lines = ["| sequences | tokens | blocks | us | dense us | times dense | error |", "|---" * 7 + "|"]
            for row in sorted(rows, key=lambda row: (-row["batch"], row["tokens"], row["microseconds"])):
                lines.append(
                    f"| {row['batch']} | {row['tokens']:,} | {row['job'].removeprefix('decode, ')} | "
                    f"{row['microseconds']:.1f} | {row['peer_microseconds']:.1f} | {row['ratio']:.2f} | "
                    f"{row['max_rel_error']:.1e} |"
                )
        parts.append("\n".join([*lines, "", measured_on({**data, "rows": rows})]))
    return "\n\n".join(parts) or UNMEASURED


def cpu_plan_table() -> str:
    """Prefill on a processor by sparse plans, one table per device."""
    parts = []
    for data in results("*/cpu_attention.json"):
        lines = ["| model | tokens | threads | job | density | seconds | times dense | perplexity |", "|---" * 8 + "|"]
        for row in data["rows"]:
            lines.append(
                f"| {row['model']} | {row['tokens']:,} | {row['threads']} | {row['job']} | {row['density']:.3f} | "
                f"{row['seconds']:.2f} | {row['ratio']:.2f} | {row['perplexity_cost']:+.2%} |"
            )
        parts.append("\n".join([*lines, "", measured_on(data)]))
    return "\n\n".join(parts) or UNMEASURED


def term_table() -> str:
    sys.path.insert(0, str(ROOT / "src"))
    from rarefy.formats import terms

    return "```\n" + (terms.__doc__ or "").strip() + "\n```"


TABLES: dict[str, Callable[[], str]] = {
    "weight-accuracy-short": lambda: accuracy_table(SHOWN),
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
    "cpu-decode": cpu_decode_table,
    "cpu-layer": cpu_layer_table,
    "terms": term_table,
    "kv-demo": partial(cache_table, "SmolLM2-135M-Instruct"),
    "kv-lab": partial(cache_table, LAB),
    "kv-decode": decode_table,
    "gpu-decode": gpu_decode_table,
    "gpu-linear": linear_table,
    "attention-prefill-lab": partial(attention_losses, LAB, "prefill"),
    "attention-prefill-demo": partial(attention_losses, "SmolLM2", "prefill"),
    "attention-adaptive-lab": partial(attention_losses, LAB, "prefill", False),
    "attention-adaptive-demo": partial(attention_losses, "SmolLM2", "prefill", False),
    "attention-decode-lab": partial(attention_losses, LAB, "decode"),
    "attention-decode-demo": partial(attention_losses, "SmolLM2", "decode"),
    "attention-choice-lab": partial(attention_choices, LAB),
    "attention-choice-demo": partial(attention_choices, "SmolLM2"),
    "attention-answers-lab": partial(attention_answers, LAB, "prefill"),
    "attention-answers-demo": partial(attention_answers, "SmolLM2", "prefill"),
    "attention-budget-lab": partial(attention_budgets, LAB),
    "attention-budget-demo": partial(attention_budgets, "SmolLM2"),
    "attention-training": sparse_training_table,
    "attention-estimators": estimator_table,
    **{f"attention-{goal}": partial(plan_table, goal) for goal in ("prefill", "execution", "decode")},
    "attention-cpu": cpu_plan_table,
}


def main() -> None:
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text("utf-8")
        filled = BLOCK.sub(lambda match: f"{match[1]}{TABLES[match['name']]()}\n{match[3]}", text)
        if filled != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(filled, "utf-8")
    if stale and "--check" in sys.argv:
        raise SystemExit(f"out of date: {', '.join(stale)}; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
