"""Tables of sparse attention: what plans keep, cost and gain."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from tables_shared import LAB, ROOT, UNMEASURED, Rows, mean, measured_on, results


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
    """Answers found in long contexts, a column for each task, and a table for each length."""
    parts = []
    lengths = {row["context"] for _, rows in attention_rows("retrieval", model, phase=phase) for row in rows}
    every = [
        pair for length in sorted(lengths) for pair in attention_rows("retrieval", model, phase=phase, context=length)
    ]
    for data, rows in every:
        # What the dense model cannot answer tells nothing.
        able = {row["task"]: row["accuracy"] for row in rows if row["job"] == "dense"}
        rows = [row for row in rows if able.get(row["task"], 1.0) >= 0.2]
        if not rows:
            continue
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


def truth_table(density: float = 0.1) -> str:
    """Gates by what they learned: what they keep, cost and find at one density."""
    parts = []
    for data in results("*/gate_truths.json"):
        rows = [row for row in data["rows"] if row.get("nominal") == density]
        own = {job: [row for row in rows if row["job"] == job] for job in dict.fromkeys(row["job"] for row in rows)}
        tasks = list(dict.fromkeys(row["task"] for row in rows if row["kind"] == "retrieval"))
        told = ["mass kept", "output error", "nats above dense", "KL", *tasks]
        lines = [f"| plan | {' | '.join(told)} |", "|---" * (1 + len(told)) + "|"]
        loss = {job: next((row for row in each if row["kind"] == "prefill"), None) for job, each in own.items()}
        for job in sorted((job for job in own if loss[job]), key=lambda job: loss[job]["kl"]):  # type: ignore[index]
            choice = next((row for row in own[job] if row["kind"] == "choice"), None)
            right = {row["task"]: row["accuracy"] for row in own[job] if row["kind"] == "retrieval"}
            kept = ["-", "-"] if choice is None else [f"{choice['recall']:.1%}", f"{choice['error']:.3f}"]
            cost = [f"{loss[job]['gap']:+.4f}", f"{loss[job]['kl']:.4f}"]  # type: ignore[index]
            cells = [*kept, *cost, *(f"{right[task]:.0%}" if task in right else "-" for task in tasks)]
            lines.append(f"| {job.removesuffix(f' {density:g}')} | {' | '.join(cells)} |")
        shown = next(row for row in rows if row["kind"] == "prefill")
        notes = "; ".join(dict.fromkeys(row["note"] for row in rows if row.get("note")))
        parts.append(
            "\n".join([*lines, "", f"At {shown['density']:.1%}; {notes}. {attention_facts(data, [shown, *rows])}"])
        )
    return "\n\n".join(parts) or UNMEASURED


def truth_layers() -> str:
    """Where in the model gates keep more of the mass than they did untrained."""
    parts = []
    for data in results("*/gate_truths.json"):
        rows = [row for row in data["rows"] if row["kind"] == "layer"]
        spans = [(0, 3), (3, 11), (11, max(row["layer"] for row in rows) + 1)]
        lines = [f"| plan | {' | '.join(f'layers {low} to {high - 1}' for low, high in spans)} |", "|---" * 4 + "|"]
        jobs = dict.fromkeys(row["job"].partition(", layer")[0] for row in rows)
        for job in [*jobs, "most that as few could keep"]:
            name, first = ("recall", job) if job in jobs else ("best", next(iter(jobs)))
            own = [row for row in rows if row["job"].startswith(f"{first}, layer")]
            cells = [mean([row for row in own if low <= row["layer"] < high], name) for low, high in spans]
            told = job.removesuffix(f" {rows[0]['nominal']:g}")
            lines.append(f"| {told} | {' | '.join(f'{cell:.1%}' for cell in cells)} |")
        parts.append("\n".join([*lines, "", attention_facts(data, rows)]))
    return "\n\n".join(parts) or UNMEASURED


def attention_budgets(model: str) -> str:
    """How calibrated thresholds keep their budget on text they were not calibrated on."""
    parts = []
    for data, rows in attention_rows("budget", model):
        lines = ["| budget | mean error of a head | worst | within | within half as much again |"]
        lines += ["|---" * 5 + "|"]
        known = all("tiles_found" in row for row in rows)
        if known:
            lines[0] += " tiles found | as many | found without means | as many |"
            lines[1] += "---|" * 4
        for row in sorted(rows, key=lambda row: (row["budget"], row["job"])):
            name = f"{row['budget']:g}" + (", every query" if "every=1" in row["job"] else "")
            line = (
                f"| {name} | {row['mean_error']:.4f} | {row['worst_error']:.3f} | {row['within']:.1%} | "
                f"{row['within_half_more']:.1%} |"
            )
            if known:
                line += "".join(
                    f" {row[f'{name}_found']:.1%} | {row[f'{name}_as_many']:.2f} |"
                    for name in ("tiles", "tiles_without_means")
                )
            lines.append(line)
        parts.append("\n".join([*lines, "", attention_facts(data, rows)]))
    return "\n\n".join(parts) or UNMEASURED


def sparse_training_table() -> str:
    """A model trained to attend sparsely beside the same trained densely, one table per device and density."""
    parts = []
    for data in results("*/sparse_training.json"):
        for density in sorted({row["density"] for row in data["rows"]}):
            own = [row for row in data["rows"] if row["density"] == density]
            lines = ["| trained | attends | density | nats | beside dense trained densely |", "|---" * 5 + "|"]
            for row in own:
                lines.append(
                    f"| {row['job']} | {row['attention']} | {row['measured_density']:.1%} | {row['nll']:.4f} | "
                    f"{row['gap']:+.4f} |"
                )
            first = next(row for row in own if row["steps"])
            facts = f"{first['model']}, {first['steps']} steps of {first['batch']} x {first['context']} tokens;"
            parts.append("\n".join([*lines, "", f"{facts} {measured_on({**data, 'rows': own})}"]))
    return "\n\n".join(parts) or UNMEASURED


def estimator_table() -> str:
    """Plans and their estimators in milliseconds, one table per device."""
    parts = []
    for data in results("*/gpu_estimators.json"):
        peers = ("flash", "cudnn", "fa4")
        heads = ["tokens", "plan", "estimate ms", "of dense", "execute ms", "whole ms"]
        lines = [f"| {' | '.join([*heads, *(f'times dense {peer}' for peer in peers)])} |"]
        lines.append("|---" * (len(heads) + len(peers)) + "|")
        by: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
        for row in data["rows"]:
            by.setdefault((row["tokens"], row["job"]), {})[row["peer"].partition(",")[0]] = row
        for (tokens, job), own in sorted(by.items()):
            row, name = next(iter(own.values())), job.removesuffix(", 10%")
            ratios = " | ".join(f"{own[peer]['ratio']:.2f}" if peer in own else "-" for peer in peers)
            lines.append(
                f"| {tokens:,} | {name} | {row['estimate_milliseconds']:.2f} | {row['share']:.1%} | "
                f"{row['execute_milliseconds']:.2f} | {row['milliseconds']:.2f} | {ratios} |"
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
            heads = ["sequences", "tokens", "blocks", "us", "without a graph", "dense us", "times dense", "error"]
            lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            for row in sorted(rows, key=lambda row: (-row["batch"], row["tokens"], row["microseconds"])):
                idle = f"{row['from_idle']:.1f}" if "from_idle" in row else "-"
                lines.append(
                    f"| {row['batch']} | {row['tokens']:,} | {row['job'].removeprefix('decode, ')} | "
                    f"{row['microseconds']:.1f} | {idle} | {row['peer_microseconds']:.1f} | {row['ratio']:.2f} | "
                    f"{row['max_rel_error']:.1e} |"
                )
        parts.append("\n".join([*lines, "", measured_on({**data, "rows": rows})]))
    return "\n\n".join(parts) or UNMEASURED


def tile_table() -> str:
    """What executors take for blocks and what for the ends of a tile of queries, from a line through their times."""
    parts = []
    for data in results("*/gpu_attention.json"):
        rows = [row for row in data["rows"] if row["goal"] == "execution"]
        by: dict[tuple[int, str], Rows] = {}
        for row in sorted(rows, key=lambda row: (row["tokens"], row["job"])):
            by.setdefault((row["tokens"], row["job"].rpartition(", ")[2]), []).append(row)
        lines = ["| tokens | executor | of cuDNN's rate within a tile | ends of a tile, in blocks |", "|---" * 4 + "|"]
        for (tokens, name), own in by.items():
            if len(own) < 3:
                continue
            line = statistics.linear_regression(
                [row["measured_density"] for row in own], [row["milliseconds"] for row in own]
            )
            block = int(name.rpartition("x")[2]) if "x" in name else 128
            visible = (tokens / block + 1) / 2  # blocks that a tile sees, in the mean
            rate = own[0]["peer_milliseconds"] / line.slope
            lines.append(f"| {tokens:,} | {name} | {rate:.2f} | {line.intercept / line.slope * visible:.1f} |")
        if len(lines) > 2:
            parts.append("\n".join([*lines, "", measured_on({**data, "rows": rows})]))
    return "\n\n".join(parts) or UNMEASURED


def break_even_table() -> str:
    """Up to which density a plan beats dense attention, by length: what the policy goes by."""
    entries = json.loads((ROOT / "src" / "rarefy" / "attention" / "measured.json").read_text("utf-8"))
    entries = [each for each in entries if each["phase"] == "prefill"]
    if not entries:
        return UNMEASURED
    names = list(dict.fromkeys(name for each in entries for name in each["executors"]))
    curves = {name: [each["executors"].get(name, 0.0) for each in entries] for name in names}
    lengths = [f"{each['tokens'] // 1024}k" for each in entries]
    chart = ["```mermaid", "xychart-beta", f'  x-axis "tokens" [{", ".join(lengths)}]', '  y-axis "density" 0 --> 1']
    chart += [f"  line [{', '.join(f'{density:g}' for density in curve)}]" for curve in curves.values()]
    lines = [f"| tokens | {' | '.join(names)} | measured on |", "|---" * (2 + len(names)) + "|"]
    for place, (length, each) in enumerate(zip(lengths, entries, strict=True)):
        own = " | ".join(f"{curve[place]:.0%}" for curve in curves.values())
        lines.append(f"| {length} | {own} | {each['source'].partition(', ')[2]} |")
    return "\n".join([*chart, "```", "", *lines])


def cpu_plan_table() -> str:
    """Prefill on a processor by sparse plans, one table per device: seconds of attention and of the whole."""
    parts = []
    for data in results("*/cpu_attention.json"):
        seconds = "attention s | times dense | whole s | times dense"
        lines = [f"| model | tokens | numbers | plan | density | {seconds} | perplexity |", "|---" * 10 + "|"]
        pairs: dict[tuple[Any, ...], Rows] = {}
        for row in data["rows"]:
            plan = row["job"].partition(", ")[2].replace(",dense_below=0", "")
            pairs.setdefault((row["model"], row["tokens"], row["dtype"], plan), []).append(row)
        for (model, tokens, dtype, plan), both in pairs.items():
            own = {row["goal"]: row for row in both}
            part, whole = own["CPU attention part"], own["CPU prefill"]
            lines.append(
                f"| {model} | {tokens:,} | {dtype.removeprefix('torch.')} | {plan} | {part['density']:.3f} | "
                f"{part['seconds']:.2f} | {part['ratio']:.2f} | {whole['seconds']:.2f} | {whole['ratio']:.2f} | "
                f"{part['perplexity_cost']:+.2%} |"
            )
        threads = ", ".join(sorted({str(row["threads"]) for row in data["rows"]}))
        parts.append("\n".join([*lines, "", f"{threads} thread; {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


TABLES: dict[str, Callable[[], str]] = {
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
    "attention-truths": truth_table,
    "attention-truth-layers": truth_layers,
    "attention-training": sparse_training_table,
    "attention-estimators": estimator_table,
    **{f"attention-{goal}": partial(plan_table, goal) for goal in ("prefill", "execution", "decode")},
    "attention-tiles": tile_table,
    "attention-break-even": break_even_table,
    "attention-cpu": cpu_plan_table,
}
