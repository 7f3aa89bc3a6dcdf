"""The measured table: its entries are valid, the longest known length below a pass decides, and plans follow it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rarefy.attention import executors as table_of_executors
from rarefy.attention import measured as table
from rarefy.attention.call import Call
from rarefy.attention.estimators import Noise, PooledMeans
from rarefy.attention.estimators.low_bit import LowBitProducts
from rarefy.attention.estimators.windowed import WindowMeans
from rarefy.attention.executors import choose, executors, limit
from rarefy.attention.measured import DEFAULT, Measured, measured
from rarefy.attention.plan import AttentionPlan
from rarefy.attention.policy import Policy
from rarefy.attention.reach import Reach
from rarefy.attention.report import PlanReport
from rarefy.attention.selectors import Threshold, TopK
from rarefy.attention.source import Plain
from tests.attention.maps import random_map, tensors

CPU = torch.device("cpu")


def test_entries_name_executors_and_densities() -> None:
    for entry in table._entries():
        assert entry.executors and entry.source
        for name, density in entry.executors.items():
            assert name in executors and 0 <= density <= 1


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    rows = (
        Measured(device="cpu", phase="prefill", tokens=32, executors={"reference": 0.0, "cpu": 0.9}),
        Measured(
            device="cpu",
            phase="prefill",
            tokens=64,
            executors={"cpu": 0.4, "reference": 0.1},
            estimators={"LowBitProducts, every 2": 0.5},
        ),
        Measured(device="cpu", phase="decode", tokens=64, executors={"reference": 0.3}),
        Measured(device="cuda 9", phase="prefill", tokens=1, executors={"fa4": 1.0}),
    )
    monkeypatch.setattr(table, "_entries", lambda: rows)
    table._best.cache_clear()
    yield
    table._best.cache_clear()


@pytest.mark.usefixtures("known")
def test_the_longest_length_below_decides() -> None:
    assert measured(CPU, "prefill", 16).tokens == 32  # the shortest that is known
    other = torch.device("meta")
    assert measured(other, "prefill", 16) is DEFAULT and limit(other, "prefill", 16) == DEFAULT.executors["reference"]
    assert limit(CPU, "prefill", 40) == 0.0
    assert limit(CPU, "prefill", 64) == limit(CPU, "prefill", 5000) == 0.4
    assert limit(CPU, "decode", 64) == 0.3


@pytest.mark.usefixtures("known")
def test_what_runs_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that is named, or the first whose kernel has such blocks."""
    assert limit(CPU, "prefill", 64, name="reference") == 0.1
    assert limit(CPU, "prefill", 64, name="flex") == 0.4  # which nothing is known of
    monkeypatch.setattr(executors.get("cpu"), "tiles", lambda self, block_q, block_k: block_k >= 32)
    assert limit(CPU, "prefill", 64, blocks=(16, 16)) == 0.1 and limit(CPU, "prefill", 64, blocks=(16, 32)) == 0.4
    assert executors.get("fa4")().tiles(128, 128) and not executors.get("fa4")().tiles(64, 64)
    assert executors.get("triton")().tiles(1, 64) and not executors.get("triton")().tiles(64, 48)


@pytest.mark.usefixtures("known")
def test_what_an_estimator_takes_is_not_left_for_blocks() -> None:
    reach = Reach.last(70, 70)
    query, key, value = tensors(reach)
    for every, expected in ((1, 0.4), (2, 0.2)):
        plan = AttentionPlan(LowBitProducts(every=every), TopK(0.3), Policy(dense_below=0), 16, 16)
        assert plan.limit(Call(query, Plain(key, value), reach, 0.3)) == pytest.approx(expected)
    labels = {each.label for each in (PooledMeans(), PooledMeans(0.1), WindowMeans(4, 2), WindowMeans(4, 2, every=4))}
    assert len(labels) == 4


@pytest.mark.usefixtures("known")
def test_plans_follow_the_table(caplog: pytest.LogCaptureFixture) -> None:
    report = PlanReport()
    for tokens, selector, reason in (
        (40, TopK(0.2), "dense is faster here"),
        (70, TopK(0.5), "denser than 0.4"),
        (70, TopK(0.3), None),
        (70, Threshold(0.0), "denser than 0.4"),  # which only the map tells
    ):
        reach = Reach.last(tokens, tokens)
        query, key, value = tensors(reach)
        call = Call(query, Plain(key, value), reach, 0.3)
        report.clear()
        output = AttentionPlan(Noise(), selector, Policy(dense_below=0), 16, 16).attend(call, report)
        assert (output is None) == (reason is not None)
        assert list(report.dense()) == ([] if reason is None else [reason])
    reach = Reach.last(1, 40)
    query, key, value = tensors(reach, 2)
    report.clear()
    plan = AttentionPlan(Noise(), Threshold(0.5), Policy(dense_below=0, max_density=0.4), 16, 16)
    assert plan.attend(Call(query, Plain(key, value), reach, 0.3), report) is None
    assert list(report.dense()) == ["its density is not known beforehand"]
    reach = Reach.last(40, 40)
    query, key, value = tensors(reach, 2, 4)
    table_of_executors._tell_slow.cache_clear()
    for _ in range(2):
        assert choose("auto", query, Plain(key, value), random_map(reach, 2, 4)).name == "reference"
    assert [record.message for record in caplog.records] == [
        "Sparse attention runs by the reference on this cpu, which is slow (it is the first of the measured table)."
    ]
    reach = Reach.last(1, 40)
    few, key, value = tensors(reach, 2, 4)  # two rows of 40 keys are 80 to decode over
    assert choose("auto", few, Plain(key, value), random_map(reach, 2, 2, 1), phase="decode").name == "reference"
