"""Write the table of executors (``rarefy/attention/measured.json``) from results of ``gpu_attention.py``.

For each length of prefill: executors by their time on random maps of 10%, and the density at which each of them, with
what estimating and selecting takes, needs as long as torch's best dense kernel; between densities that were measured
time is taken to be a line. What other estimators take beyond that stands beside, also from ``gpu_estimators.json`` in
the same folders. What launching a plan takes from idle counts too, since nothing may hide it. Of decoding only 10% is
measured, by ``gpu_attention_decode.py``: attention over more blocks is taken to grow as they do, all else to stay.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from rarefy.attention.measured import TABLE, Measured

Row = dict[str, Any]


def break_even(times: dict[float, float], extra: float, dense: float) -> float:
    """The density at which ``times`` (by density) and ``extra`` meet ``dense``; 0 where they never do, at most 1."""
    known = sorted(times.items())
    if known[0][1] + extra >= dense:
        return 0.0
    for (low, before), (high, after) in pairwise(known):
        if after + extra >= dense:
            return low + (high - low) * (dense - extra - before) / (after - before)
    (low, before), (high, after) = known[-2:]
    return min(1.0, high + (high - low) * (dense - extra - after) / max(after - before, 1e-9))


def launching(row: Row) -> float:
    """Milliseconds by which a plan takes longer where nothing hides its launches."""
    return max(0.0, row.get("from_idle", 0.0) - row["milliseconds"])


def prefill(rows: list[Row], others: list[Row], device: str, source: str) -> list[Measured]:
    found = []
    alone: dict[int, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["goal"] == "execution":
            alone[row["tokens"]][row["job"].rpartition(", ")[2]][row["measured_density"]] = row["milliseconds"]
    for tokens, times in sorted(alone.items()):
        own = [row for row in rows if peer(row) and row["tokens"] == tokens and row["estimator"] == "PooledMeans"]
        dense = [
            row["peer_milliseconds"]
            for row in rows
            if row["tokens"] == tokens and row["goal"] == "prefill" and row["peer"] in ("dense flash", "dense cudnn")
        ]
        if not own:
            continue
        extra = own[0]["estimator_and_selection_share"] * own[0]["peer_milliseconds"]
        launched = {row.get("executor", ""): launching(row) for row in own}
        many = {name: each for name, each in times.items() if len(each) > 1}
        limits: dict[str, float] = {}
        for name, each in many.items():  # an executor goes by the slowest form of its blocks
            who = name.split()[0]
            late = extra + launched.get(who, max(launched.values()))
            limits[who] = min(round(break_even(each, late, min(dense)), 3), limits.get(who, 1.0))
        # The fastest first, but none whose launches alone take as long as dense attention before one whose do not.
        near = {name.split()[0]: min(many[name].items(), key=lambda pair: abs(pair[0] - 0.1))[1] for name in many}
        limits = {who: limits[who] for who in sorted(limits, key=lambda who: (not limits[who], near[who]))}
        found.append(Measured(
            device=device, phase="prefill", tokens=tokens, executors=limits,
            estimators=estimators(rows, others, tokens), source=source,
        ))  # fmt: skip
    return found


def estimators(rows: list[Row], others: list[Row], tokens: int) -> dict[str, float]:
    """Shares of dense attention's time that estimators take beyond pooled means, by label: the most at the length that
    was measured next to ``tokens``."""
    own = {(row["estimator"], row["tokens"]): row["estimator_and_selection_share"] for row in rows if peer(row)}
    base = {length: share for (label, length), share in own.items() if label == "PooledMeans"}
    shares: dict[str, dict[int, float]] = defaultdict(dict)
    for (label, length), share in own.items():
        shares[label][length] = share - base.get(length, 0.0)
    for row in others:
        known = shares[row["estimator"]].get(row["tokens"], 0.0)
        shares[row["estimator"]][row["tokens"]] = max(known, row["share"])
    nearest = {label: by[min(by, key=lambda length: abs(length - tokens))] for label, by in shares.items()}
    return {label: round(share, 3) for label, share in sorted(nearest.items()) if share >= 0.001}


def peer(row: Row) -> bool:
    """Whether a row of a plan is beside torch's best dense kernel, and tells its estimator."""
    return row["goal"] == "prefill" and row["peer"] == "dense cudnn" and "estimator" in row


def decode(rows: list[Row], device: str, source: str) -> list[Measured]:
    """From plans that Python launches, beside the time that the dense kernel takes on the GPU alone."""
    limits: dict[int, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if "from_idle" in row and row["goal"] == "decode":
            attention = row["parts_microseconds"]["attention"]
            left = row["peer_microseconds"] - (row["from_idle"] - attention)
            own = limits[row["batch"] * row["tokens"]]
            own[row["estimator"]] = min(max(0.0, row["density"] * left / attention), own.get(row["estimator"], 1.0))
    found = []
    for tokens, own in sorted(limits.items()):
        if "PooledMeans" not in own:
            continue
        best = own["PooledMeans"]
        lost = {label: round(1 - limit / best, 3) for label, limit in sorted(own.items()) if limit < best}
        found.append(Measured(
            device=device, phase="decode", tokens=tokens, executors={"triton": round(best, 3)}, estimators=lost,
            source=source,
        ))  # fmt: skip
    return found


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files of gpu_attention.py; of equal lengths the last")
    parser.add_argument("--device", default="cuda 9", help="'cuda' and the first number of the compute capability")
    options = parser.parse_args()
    beside = [path.with_name("gpu_estimators.json") for path in options.results]
    others = [row for path in beside if path.is_file() for row in json.loads(path.read_text("utf-8"))["rows"]]
    fresh: dict[tuple[str, int], Measured] = {}
    for path in options.results:
        data = json.loads(path.read_text("utf-8"))
        source = f"{path.parent.name}/{path.name}, {data['device']}"
        own = prefill(data["rows"], others, options.device, source) + decode(data["rows"], options.device, source)
        fresh.update({(each.phase, each.tokens): each for each in own})
    kept = [Measured(**row) for row in json.loads(TABLE.read_text("utf-8")) if row["device"] != options.device]
    ordered = sorted(fresh.values(), key=lambda each: (each.phase != "prefill", each.tokens))
    table = [each.model_dump(mode="json") for each in (*kept, *ordered)]
    TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in table) + "\n]\n", "utf-8")
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
