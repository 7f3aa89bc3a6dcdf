"""Tables of the measuring itself: what long contexts show of a cache, and what combinations cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from tables_shared import ROOT, UNMEASURED, Rows, measured_on, results


def _records(name: str) -> list[dict[str, Any]]:
    """Committed records of a command, one of each device."""
    paths = sorted((ROOT / "docs" / "results").glob(f"*/{name}.json"))
    return [json.loads(path.read_text("utf-8")) for path in paths]


def _measured_on(record: dict[str, Any]) -> str:
    made = record["run"]["environment"]
    device = made["gpus"][0]["name"] if made["gpus"] else f"{made['processor']}, {made['cores']} cores"
    return f"measured on {device}, torch {made['packages']['torch']}"


def long_table() -> str:
    """The suite at its default sizes, a row for each task; both ways of asking together."""
    sys.path.insert(0, str(ROOT / "src"))
    from rarefy.evaluation.long.results import LongComparison, LongEvaluation, summarize

    parts = []
    for record in _records("long"):
        found = LongComparison.model_validate({key: record[key] for key in ("candidates", "reference")})
        dense = found.reference
        assert dense is not None
        (coded,) = found.candidates

        def one_way(evaluation: LongEvaluation, mode: str) -> LongEvaluation:
            return evaluation.model_copy(update={"answers": tuple(a for a in evaluation.answers if a.mode == mode)})

        lines = [
            "| task | asked | exact, dense | exact | nats above dense | 95% interval | KL |", "|" + "---|" * 7,
        ]  # fmt: skip
        for mode, asked in (("multi_request", "one by one"), ("multi_turn", "in one conversation")):
            for each in summarize(one_way(coded, mode), one_way(dense, mode)):
                if each.nll_change is None or each.kl is None or each.reference_accuracy is None:
                    continue
                gap = each.nll_change
                lines.append(
                    f"| {each.task} | {asked} | {each.reference_accuracy:.0%} | {each.accuracy:.0%} | "
                    f"{gap.value:+.4f} | {gap.low:+.4f} .. {gap.high:+.4f} | {each.kl.value:.4f} |"
                )
        seconds = coded.seconds + dense.seconds
        facts = f"{coded.model}; {coded.protocol.describe()}; {seconds / 60:.1f} minutes for both"
        parts.append("\n".join([*lines, "", f"{facts}; {_measured_on(record)}."]))
    return "\n\n".join(parts) or UNMEASURED


def control_table() -> str:
    """How far apart a perfect and a bad cache are in each task of the suite."""
    parts = []
    for data in results("*/long_control.json"):
        lines = ["| task | asked | KL of the perfect cache, at most | KL of the bad one, at least | told apart |"]
        lines.append("|" + "---|" * 5)
        pairs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for row in data["rows"]:
            pairs.setdefault((row["job"], row["mode"]), {})[row["peer"]] = row
        for (job, mode), pair in pairs.items():
            perfect, bad = pair["perfect"], pair["bad"]
            high, low = perfect.get("kl_high", perfect["kl"]), bad.get("kl_low", bad["kl"])
            lines.append(f"| {job} | {mode} | {high:.2e} | {low:.3f} | {'yes' if bad['told_apart'] else 'no'} |")
        parts.append("\n".join([*lines, "", f"{data['rows'][0]['protocol']}; {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


def retrieval_table() -> str:
    """Which share of queries finds its key among millions, by cache."""
    parts = []
    for data in results("*/coded_retrieval.json"):
        lines = ["| keys | cache | bits a number | found | among the first ten |", "|" + "---|" * 5]
        for row in data["rows"]:
            lines.append(
                f"| {row['keys']:,} | {row['peer']} | {row['bits_per_number']:.2f} | {row['found']:.1%} | "
                f"{row['found_among_ten']:.1%} |"
            )
        parts.append("\n".join([*lines, "", f"{data['rows'][0]['note']}; {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


def efficiency_table() -> str:
    """Costs and quality of every combination of a matrix, one table for each device."""
    parts = []
    for record in _records("efficiency"):
        lines = [
            "| model | attention | cache | batch x prompt | first token ms | token ms | p95 | peak GB | of memory | "
            "compute | decode of roofline | J a token | times smaller | perplexity |", "|" + "---|" * 14,
        ]  # fmt: skip
        rows: Rows = record["rows"]
        for row in rows:
            cost, load = row["cost"], row["cost"]["load"]
            first, token, memory = cost["first_token"], cost["token"], cost["memory"]
            lines.append(
                f"| {row['model']} | {row['attention']} | {row['cache']} | {load['batch']} x {load['prompt_tokens']} | "
                f"{1e3 * first['p50']:.1f} | {1e3 * token['p50']:.1f} | {1e3 * token['p95']:.1f} | "
                f"{memory['peak_bytes'] / 1e9:.2f} | {_share(memory['mean_bytes'] / memory['capacity_bytes'])} | "
                f"{_share(cost['compute_utilization'])} | {_share(cost['decode_roofline'])} | "
                f"{_number(cost['joules_per_token'])} | {_number(row['compression_ratio'])} | "
                f"{_number(row['perplexity'], 2)} |"
            )
        energy = rows[0]["cost"]["energy"]
        facts = f"{record['protocol']}; energy: {energy['source'] if energy else 'no counter'}; {_measured_on(record)}."
        parts.append("\n".join([*lines, "", facts]))
    return "\n\n".join(parts) or UNMEASURED


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, places: int = 3) -> str:
    return "-" if value is None else f"{value:.{places}f}"


TABLES: dict[str, Callable[[], str]] = {
    "long": long_table, "long-control": control_table, "coded-retrieval": retrieval_table,
    "efficiency": efficiency_table,
}  # fmt: skip
