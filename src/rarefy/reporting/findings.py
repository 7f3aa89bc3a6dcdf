"""Results of commands (``--json``), read back and put together: what a report is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rarefy.calibration.report import CompressionReport
from rarefy.core.config import StrictModel, parse
from rarefy.core.environment import Run
from rarefy.core.errors import SourceError
from rarefy.evaluation.caches import CacheComparison
from rarefy.evaluation.efficiency.matrix import Efficiency
from rarefy.evaluation.long.results import LongComparison
from rarefy.evaluation.results import Comparison, Evaluation, ModelDifference
from rarefy.evaluation.tasks.results import TaskComparison
from rarefy.reporting.benchmarks import Benchmark, is_benchmark

# Results that are read as they are: by kind, where they go and what they are.
KINDS: dict[str, tuple[str, type[StrictModel]]] = {
    "tasks": ("tasks", TaskComparison),
    "long": ("long", LongComparison),
    "compression": ("compressions", CompressionReport),
    "caches": ("caches", CacheComparison),
    "efficiency": ("efficiency", Efficiency),
}


class Findings(StrictModel):
    """Everything that one report shows. ``comparisons`` hold models measured under one protocol each; ``runs`` are the
    commands that it came from, each once."""

    comparisons: tuple[Comparison, ...] = ()
    compressions: tuple[CompressionReport, ...] = ()
    differences: tuple[ModelDifference, ...] = ()
    tasks: tuple[TaskComparison, ...] = ()
    long: tuple[LongComparison, ...] = ()
    caches: tuple[CacheComparison, ...] = ()
    efficiency: tuple[Efficiency, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    runs: tuple[Run, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        return not any(getattr(self, name) for name in type(self).model_fields if name not in ("runs", "notes"))

    def compression_of(self, model: str) -> CompressionReport | None:
        """How the model of that name in an evaluation was compressed, if that is known."""
        for report in self.compressions:
            if report.out is not None and model in (report.out, Path(report.out).name):
                return report
        return None


def read_findings(paths: Sequence[Path]) -> Findings:
    """The findings in ``paths``: files that commands or benchmarks wrote with ``--json``, or folders of such files
    (``*.json``).

    Raises SourceError, naming the file, for what is missing, no JSON, or no result of rarefy.
    """
    found = Findings()
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise SourceError(f"Folder '{path}' holds no .json file; write results there with --json.")
        for file in files:
            found = join([found, _read(file)])
    return found


def join(parts: Iterable[Findings]) -> Findings:
    """All findings as one: evaluations under the same protocol are put side by side, repeated ones kept once."""
    whole = list(parts)
    comparisons: dict[str, Comparison] = {}
    for comparison in (comparison for part in whole for comparison in part.comparisons):
        everyone = [*comparison.candidates, *([comparison.reference] if comparison.reference else [])]
        key = everyone[0].protocol.describe() + (comparison.reference.model if comparison.reference else "")
        known = comparisons.get(key)
        if known is not None:
            fresh = [each for each in comparison.candidates if each not in known.candidates]
            comparison = known.model_copy(update={"candidates": [*known.candidates, *fresh]})
        comparisons[key] = comparison
    return Findings(
        comparisons=tuple(comparisons.values()),
        compressions=_once(report for part in whole for report in part.compressions),
        differences=_once(difference for part in whole for difference in part.differences),
        tasks=_once(tasks for part in whole for tasks in part.tasks),
        long=_once(found for part in whole for found in part.long),
        caches=_once(found for part in whole for found in part.caches),
        efficiency=_once(found for part in whole for found in part.efficiency),
        benchmarks=_once(benchmark for part in whole for benchmark in part.benchmarks),
        runs=_once(run for part in whole for run in part.runs),
        notes=_once(note for part in whole for note in part.notes),
    )


def _once(items: Iterable[Any]) -> tuple[Any, ...]:
    kept: list[Any] = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return tuple(kept)


def _read(path: Path) -> Findings:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SourceError(f"There is no result '{path}'; write one with: rarefy eval MODEL --json > FILE.") from None
    except (OSError, ValueError, RecursionError):
        raise SourceError(f"'{path}' is not JSON that can be read; write it anew with --json.") from None
    return join(_parse(record, path) for record in (content if isinstance(content, list) else [content]))


def _parse(record: Any, path: Path) -> Findings:
    if is_benchmark(record):
        measured = parse(Benchmark, {**record, "name": path.stem}, f"'{path}'", SourceError, stored=True)
        return Findings(benchmarks=(measured,))
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in ("evaluation", "findings", *KINDS):
        raise SourceError(
            f"'{path}' does not say which result of rarefy it is (key 'kind'); name files written by compress, eval, "
            "compare, demo or a benchmark with --json."
        )
    data = {key: value for key, value in record.items() if key not in ("kind", "run")}
    runs = (parse(Run, record["run"], f"'{path}'", SourceError, stored=True),) if record.get("run") else ()
    if kind == "evaluation":
        reference = data.pop("reference", None)
        dense = None if reference is None else _evaluation(reference, path)
        comparison = Comparison(candidates=[_evaluation(data, path)], reference=dense, passes=1)
        return Findings(comparisons=(comparison,), runs=runs)
    if kind in KINDS:
        field, schema = KINDS[kind]
        return Findings(**{field: (parse(schema, data, f"'{path}'", SourceError, stored=True),), "runs": runs})
    whole = parse(Findings, _restored(data), f"'{path}'", SourceError, stored=True)
    return join([whole, Findings(runs=runs)])


def _evaluation(data: dict[str, Any], path: Path) -> Evaluation:
    return parse(Evaluation, _restored(data), f"'{path}'", SourceError, stored=True)


def _restored(data: Any) -> Any:
    """JSON has no infinity: a perplexity that overflowed was written as null."""
    if isinstance(data, dict):
        return {
            key: math.inf if key == "perplexity" and value is None else _restored(value) for key, value in data.items()
        }
    return [_restored(item) for item in data] if isinstance(data, list) else data
