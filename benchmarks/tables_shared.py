"""What the tables of results share: rows from committed files, and where they were measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = "SmolLM2-135M-Instruct (demo, jitter 0.10)"
LAB = "lab-29m"
UNMEASURED = "*No measurement of this is committed yet.*"
Rows = list[dict[str, Any]]


def mean(rows: Rows, key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


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


def machines(data: dict[str, Any]) -> str:
    """On which devices rows were measured, with which torch."""
    devices = " and ".join(sorted({row.get("device", data["device"]) for row in data["rows"]}))
    versions = " and ".join(sorted({row.get("torch", data["versions"]["torch"]) for row in data["rows"]}))
    return f"measured on {devices}, torch {versions}."


def measured_on(data: dict[str, Any]) -> str:
    """`machines`, and at which commits."""
    return f"{machines(data)} {provenance(data['rows'])}"


def provenance(rows: list[dict[str, Any]]) -> str:
    """Which commits the rows were measured at; a row that does not know its commit is counted as such."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["commit"]] = counts.get(row["commit"], 0) + 1
    named = [f"{count} at {commit}" for commit, count in counts.items() if commit != "unknown"]
    unnamed = [f"{counts['unknown']} from a work tree that no commit names"] if "unknown" in counts else []
    return f"Of {len(rows)} measurements, {' and '.join(named + unnamed)}."
