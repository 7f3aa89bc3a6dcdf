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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHOWN = ("dense", "int8 g128 Z", "int4 g128 Z", "int4 g128 Z clip", "nf4 g64", "int3 g128 Z clip", "int3 g16 F bilevel")


def weight_accuracy(rows: list[dict[str, Any]]) -> list[str]:
    """One line per recipe; with several seeds of the jitter the means, and the range of perplexities."""
    lines = [
        "| weights | bits/weight | error | perplexity | KL (nats) | top-1 | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for job in dict.fromkeys(row["job"] for row in rows):
        own = [row for row in rows if row["job"] == job]

        def mean(key: str, rows: list[dict[str, Any]] = own) -> float:
            return statistics.fmean(row[key] for row in rows)

        values = [row["perplexity"] for row in own]
        spread = f" ({min(values):.2f}-{max(values):.2f})" if max(values) - min(values) > 0.005 else ""
        shown = f"{mean('perplexity'):.2f}{spread}" if max(values) < 1e4 else "over 10,000"
        distance = f"{mean('kl'):.4f} | {mean('top1_agreement'):.1%}" if own[0]["kl"] is not None else "- | -"
        cost = f"{mean('bits_per_weight'):.3f} | {mean('relative_error'):.4f}"
        lines.append(f"| {job} | {cost} | {shown} | {distance} | {len(own)} |")
    return lines


def result(pattern: str) -> dict[str, Any]:
    """The one committed result file whose path matches."""
    found = sorted((ROOT / "docs" / "results").glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"docs/results/{pattern} matches {len(found)} files; keep exactly one.")
    data: dict[str, Any] = json.loads(found[0].read_text("utf-8"))
    # A merged file names the commit of each row, a file of one run names it once.
    data["rows"] = [{"commit": data["commit"], **row} for row in data["rows"]]
    return data


def provenance(rows: list[dict[str, Any]]) -> str:
    """Which commits the rows were measured at; a row that does not know its commit is counted as such."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["commit"]] = counts.get(row["commit"], 0) + 1
    named = [f"{count} at {commit}" for commit, count in counts.items() if commit != "unknown"]
    unnamed = [f"{counts['unknown']} from a work tree that no commit names"] if "unknown" in counts else []
    return f"Of {len(rows)} measurements, {' and '.join(named + unnamed)}."


def accuracy_table(only: tuple[str, ...] | None = None) -> str:
    data = result("*/weight_accuracy.json")
    rows = [row for row in data["rows"] if only is None or row["job"] in only]
    facts = (
        f"{data['model']}, {rows[0]['protocol']}, {rows[0]['tokens']} predicted tokens, seeds of the jitter from 0 on; "
        f"measured on {data['device']}, torch {data['versions']['torch']}. {provenance(rows)}"
    )
    return "\n".join([*weight_accuracy(rows), "", facts])


def protocol_table() -> str:
    data = result("*/weight_accuracy_24x512.json")
    facts = f"{data['rows'][0]['protocol']}; measured on {data['device']}. {provenance(data['rows'])}"
    return "\n".join([*weight_accuracy(data["rows"]), "", facts])


def term_table() -> str:
    sys.path.insert(0, str(ROOT / "src"))
    from rarefy.formats import terms

    return "```\n" + (terms.__doc__ or "").strip() + "\n```"


TABLES: dict[str, Callable[[], str]] = {
    "weight-accuracy-short": lambda: accuracy_table(SHOWN),
    "weight-accuracy": accuracy_table,
    "weight-accuracy-protocol": protocol_table,
    "terms": term_table,
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
