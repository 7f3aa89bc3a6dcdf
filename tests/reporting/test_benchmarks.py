"""What repeated rows of a benchmark say together, and which recipe is worth its bits."""

from __future__ import annotations

import pytest

from rarefy.reporting.benchmarks import best_under, cell, columns, is_benchmark, joined, quality, speeds
from tests.reporting.conftest import ACCURACY, SPEED, benchmark, row


def test_seeds_are_averaged_and_their_range_is_kept() -> None:
    (group,) = quality(benchmark("weight_accuracy", list(ACCURACY)))
    jobs = {job.name: job for job in group.jobs}
    assert group.dense is jobs["dense"] and len(group.compressed) == 4
    rtn = jobs["rtn int4"]
    assert (rtn.perplexity, rtn.spread, rtn.seeds, rtn.family) == (23.0, (22.0, 24.0), 2, "rtn")
    assert rtn.kl == pytest.approx(0.25) and rtn.kl_spread == (0.2, 0.3)


def test_only_what_is_comparable_stands_together() -> None:
    rows = [row("a", 4, 20, 0.1), row("a", 4, 20, 0.1, protocol="context 64"), row("a", 4, 20, 0.1, model="b")]
    assert [len(group.jobs) for group in quality(benchmark("x", rows))] == [1, 1, 1]
    rows = [row("a", 4, 20, 0.1, calibration="books"), row("a", 4, 19, 0.1, calibration="news")]
    (group,) = quality(benchmark("x", rows))
    assert [job.name for job in group.jobs] == ["a (books)", "a (news)"]
    (control,) = quality(benchmark("x", [row("one scale gptq nf4", 4, 20, 0.1)]))
    assert control.jobs[0].family == "gptq"
    assert quality(benchmark("speed", list(SPEED))) == [] and len(speeds(benchmark("speed", list(SPEED)))) == 2


def test_the_best_is_the_one_of_least_divergence_that_the_budget_allows() -> None:
    (group,) = quality(benchmark("weight_accuracy", list(ACCURACY)))
    found = [best_under(group.compressed, bits) for bits in (2, 3, 4, 5)]
    assert [job and job.name for job in found] == [None, "rtn int2", "gptq int3", "gptq int4"]


def test_other_rows_are_a_table() -> None:
    rows = [{"job": "a", "blocks": [1, 2], "seconds": 0.123456}, {"job": "b", "note": None}]
    assert columns(rows) == ["job", "seconds", "note"]
    assert [cell(rows[0].get(name)) for name in columns(rows)] == ["a", "0.12346", "-"]


def test_what_is_a_benchmark() -> None:
    assert is_benchmark({"device": "a", "versions": {}, "commit": "b", "rows": []})
    assert not is_benchmark([1]) and not is_benchmark({"kind": "evaluation", "device": 1, "versions": 1, "rows": 1})


def test_quality_measured_on_two_devices_is_one_picture() -> None:
    here = benchmark("weight_accuracy", [row("gptq int4", 4, 20, 0.1), row("rtn int4", 4, 30, 0.4)])
    there = benchmark("weight_accuracy", [row("llama.cpp Q4_0", 4.5, 21, 0.2), row("rtn int4", 4, 31, 0.5)])
    there = there.model_copy(update={"device": "another", "versions": {**there.versions, "more": "1"}})
    keyed = [each.model_copy(update={"key": ("job",)}) for each in (here, there)]
    one, timed = joined([keyed[0], benchmark("speed", list(SPEED)), keyed[1]])
    (group,) = quality(one)
    assert [job.name for job in group.jobs] == ["gptq int4", "rtn int4", "llama.cpp Q4_0"]
    assert group.jobs[1].perplexity == 31  # the last counts
    assert one.device == f"{here.device} and another" and one.versions["more"] == "1"
    assert one.versions["torch"] == here.versions["torch"] and timed.name == "speed"
    assert len(joined([here, there])) == 1 and len(joined([here, there])[0].rows) == 4  # without a key all rows stay
