"""Results of the scripts in ``benchmarks/``: rows of numbers from one device, and what repeated rows say together."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import pydantic

from rarefy.core.config import StrictModel

Row = dict[str, Any]
# Begins the names of jobs that a recipe of two scales is held against: the same with one.
CONTROL = "one scale "


class Benchmark(StrictModel):
    """One result file: ``name`` is that of the file, and of the script that wrote it; ``rows``, and what else there is,
    are kept as they are."""

    model_config = pydantic.ConfigDict(extra="allow")

    name: str
    device: str
    versions: dict[str, str | None]
    commit: str
    key: tuple[str, ...] = ()
    rows: tuple[Row, ...]

    def describe(self) -> str:
        """Where, with what and at which commits the rows were measured."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        commits = dict.fromkeys(str(row.get("commit", self.commit)) for row in self.rows)
        known = [commit for commit in commits if commit != "unknown"]
        named = [*known, *(["work trees that no commit names"] if len(known) < len(commits) else [])]
        return f"{len(self.rows)} measurements by benchmarks/{self.name}.py on {self.device}, {versions}, at " + (
            f"{', '.join(named)}." if named else "no commit."
        )


class Job(StrictModel):
    """What one way of compressing gives: means over ``seeds``, and the ``spread`` (least, most) of the perplexity and
    of the KL, which is None where nothing was compared."""

    name: str
    calibration: str | None
    bits: float
    perplexity: float
    kl: float | None
    top1_agreement: float | None
    spread: tuple[float, float]
    kl_spread: tuple[float, float] | None
    seeds: int

    @property
    def family(self) -> str:
        """The recipe: the first word of the name, but for those that say they are another one's control."""
        return self.name.removeprefix(CONTROL).split()[0]

    @property
    def dense(self) -> bool:
        return self.name == "dense"


class Quality(StrictModel):
    """All jobs on one model under one protocol, which alone may be compared."""

    model: str
    protocol: str
    tokens: int
    jobs: tuple[Job, ...]

    @property
    def dense(self) -> Job | None:
        return next((job for job in self.jobs if job.dense), None)

    @property
    def compressed(self) -> list[Job]:
        return [job for job in self.jobs if not job.dense]


def is_benchmark(record: Any) -> bool:
    """Whether ``record`` looks like the result file of a benchmark."""
    return isinstance(record, dict) and {"device", "versions", "rows"} <= record.keys() and "kind" not in record


def quality(benchmark: Benchmark) -> list[Quality]:
    """The rows that have bits and a perplexity, by model and protocol; none for benchmarks of other things."""
    groups: dict[tuple[str, str], dict[tuple[str, str | None], list[Row]]] = {}
    for row in benchmark.rows:
        if _number(row.get("perplexity")) and _number(row.get("bits_per_weight")) and "job" in row:
            jobs = groups.setdefault((str(row.get("model", "model")), str(row.get("protocol", "not stated"))), {})
            jobs.setdefault((str(row["job"]), row.get("calibration")), []).append(row)
    found = []
    for (model, protocol), jobs in groups.items():
        several = [job for job, _ in jobs]
        summed = tuple(
            _job(job if several.count(job) == 1 else f"{job} ({calibration or 'no calibration'})", calibration, rows)
            for (job, calibration), rows in jobs.items()
        )
        tokens = next(iter(jobs.values()))[0].get("tokens") or 0
        found.append(Quality(model=model, protocol=protocol, tokens=tokens, jobs=summed))
    return found


def joined(benchmarks: Sequence[Benchmark]) -> list[Benchmark]:
    """Benchmarks, with those of bits and quality by the same script as one: quality hardly depends on the device. Of
    rows that are equal under the key the last counts."""
    found: list[Benchmark] = []
    for benchmark in benchmarks:
        same = [index for index, other in enumerate(found) if other.name == benchmark.name and quality(other)]
        if not same or not quality(benchmark):
            found.append(benchmark)
            continue
        other = found[same[0]]
        rows = {_place(other, index): row for index, row in enumerate(other.rows)}
        rows.update({_place(benchmark, index, len(other.rows)): row for index, row in enumerate(benchmark.rows)})
        versions = {
            name: " and ".join(dict.fromkeys(filter(None, (other.versions.get(name), benchmark.versions.get(name)))))
            for name in {**other.versions, **benchmark.versions}
        }
        devices = other.device if other.device == benchmark.device else f"{other.device} and {benchmark.device}"
        more = {"device": devices, "versions": versions, "rows": tuple(rows.values())}
        found[same[0]] = other.model_copy(update=more)
    return found


def _place(benchmark: Benchmark, index: int, before: int = 0) -> tuple[Any, ...]:
    """What tells a row from the others: its values under the key, or its position."""
    row = benchmark.rows[index]
    return tuple(str(row.get(name)) for name in benchmark.key) or (before + index,)


def speeds(benchmark: Benchmark) -> list[Row]:
    """The rows that hold a time against that of a peer."""
    return [row for row in benchmark.rows if _number(row.get("ratio")) and row.get("peer") and "job" in row]


def columns(rows: Sequence[Row]) -> list[str]:
    """Every column of the rows that holds single values, in the order of their first appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if not any(isinstance(row.get(name), (list, dict)) for row in rows)]


def cell(value: Any) -> str:
    """A value of a row as text."""
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def best_under(jobs: Iterable[Job], bits: float) -> Job | None:
    """Of the jobs that take at most so many bits the one with the least loss: KL, else perplexity."""
    affordable = [job for job in jobs if job.bits <= bits]
    return min(affordable, key=lambda job: (math.inf if job.kl is None else job.kl, job.perplexity), default=None)


def title(name: str) -> str:
    """``weight_accuracy`` as words."""
    words = re.sub(r"[_-]+", " ", name).strip()
    return words[:1].upper() + words[1:]


def _job(name: str, calibration: str | None, rows: Sequence[Row]) -> Job:
    def values(column: str) -> list[float]:
        return [float(row[column]) for row in rows if _number(row.get(column))]

    def mean(column: str) -> float | None:
        return statistics.fmean(values(column)) if values(column) else None

    perplexities, divergences = values("perplexity"), values("kl")
    return Job(
        name=name, calibration=calibration, bits=statistics.fmean(values("bits_per_weight")),
        perplexity=statistics.fmean(perplexities), kl=mean("kl"), top1_agreement=mean("top1_agreement"),
        spread=(min(perplexities), max(perplexities)),
        kl_spread=(min(divergences), max(divergences)) if divergences else None, seeds=len(rows),
    )  # fmt: skip


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
