"""What commands write with --json is read back as it was, put together, and refused by name when it is not ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rarefy.core.errors import SourceError
from rarefy.reporting.findings import Findings, join, read_findings
from tests.reporting.conftest import Write, compression, evaluation, run, tasks


def record(kind: str, data: Any) -> dict[str, Any]:
    return {"kind": kind, **data.model_dump(mode="json"), "run": run("rarefy something").model_dump(mode="json")}


def test_every_kind_of_result_is_read(findings: Findings, tmp_path: Path, write: Write) -> None:
    dense, int4 = findings.comparisons[0].reference, findings.comparisons[0].candidates[0]
    assert dense is not None
    write(tmp_path / "a.json", {**record("evaluation", int4), "reference": dense.model_dump(mode="json")})
    write(tmp_path / "b.json", record("tasks", findings.tasks[0]))
    write(tmp_path / "c.json", [record("compression", report) for report in findings.compressions])
    write(tmp_path / "e.json", record("long", findings.long[0]))
    write(tmp_path / "g.json", record("caches", findings.caches[0]))
    write(tmp_path / "f.json", record("efficiency", findings.efficiency[0]))
    write(tmp_path / "d.json", record("findings", Findings(differences=findings.differences)))
    for each in findings.benchmarks:
        write(tmp_path / f"{each.name}.json", each.model_dump(exclude={"name"}))
    (tmp_path / "notes.txt").write_text("not a result")
    found = read_findings([tmp_path])
    assert found.comparisons[0].candidates == [int4] and found.comparisons[0].reference == dense
    assert found.caches == findings.caches and found.long == findings.long and found.efficiency == findings.efficiency
    assert set(map(repr, found.benchmarks)) == set(map(repr, findings.benchmarks))
    assert (found.tasks, found.compressions, found.differences) == (
        findings.tasks, findings.compressions, findings.differences,
    )  # fmt: skip
    assert found.runs == (run("rarefy something"),)


def test_models_under_one_protocol_stand_side_by_side(tmp_path: Path, write: Write) -> None:
    dense = evaluation("dense", 32, 16.7, None).model_dump(mode="json")
    for name in ("int4", "int3"):
        write(tmp_path / f"{name}.json", {**record("evaluation", evaluation(name, 4, 20, 0.2)), "reference": dense})
    other = evaluation("int4", 4, 30, 0.2)
    other = other.model_copy(update={"protocol": other.protocol.model_copy(update={"context": 64})})
    write(tmp_path / "other.json", {**record("evaluation", other), "reference": None})
    again = [tmp_path / f"{name}.json" for name in ("int4", "int3", "other", "int4")]
    first, second = read_findings(again).comparisons
    assert [each.model for each in first.candidates] == ["int4", "int3"] and second.candidates == [other]


def test_a_perplexity_that_overflowed_is_infinite_again(tmp_path: Path, write: Write) -> None:
    broken = {**record("evaluation", evaluation("broken", 2, 1.0, 9.0)), "perplexity": None}
    found = read_findings([write(tmp_path / "a.json", broken)])
    assert math.isinf(found.comparisons[0].candidates[0].perplexity)


def test_a_compression_is_found_by_the_name_of_its_folder() -> None:
    found = Findings(compressions=(compression("int4", 4, 0.1),))
    assert found.compression_of("int4") is found.compression_of("models/int4") is found.compressions[0]
    assert found.compression_of("int3") is None
    assert join([]).empty and not Findings(tasks=(_tasks(),)).empty


def _tasks() -> Any:
    from rarefy.evaluation.tasks.results import TaskComparison

    return TaskComparison(candidates=[tasks("a", None)], reference=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "does not say which result"),
        ('{"kind": "poem"}', "does not say which result"),
        ('{"kind": "evaluation", "model": "a"}', "Field required"),
        ('{"kind": "compression", "color": 1}', "color"),
        ('{"kind": "tasks", "candidates": "many", "reference": null}', "candidates"),
    ],
)
def test_files_of_others_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(content)
    with pytest.raises(SourceError, match=message) as caught:
        read_findings([path])
    assert "odd.json" in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="There is no result"):
        read_findings([tmp_path / "none.json"])
    with pytest.raises(SourceError, match=r"holds no \.json file"):
        read_findings([tmp_path])
