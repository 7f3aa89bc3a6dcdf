"""The whole demo on the real model, with the least text and the shortest answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run, one_json


@pytest.mark.demo
def test_the_demo_does_the_whole_job(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    small = ("--windows", 1, "--context", 64, "--max-new-tokens", 1)
    record = one_json(run("demo", *small, "--out", tmp_path / "models", "--json"))
    assert record["reloaded_logits_identical"] and "Q4_1" in record["note"]
    int4, int3 = record["candidates"]
    dense = record["reference"]
    assert (int4["model"], int3["model"]) == ("int4", "int3")
    assert dense["stored_bytes"] > int4["stored_bytes"] > int3["stored_bytes"]
    assert dense["perplexity"] < int3["perplexity"] and 0 < int4["kl"] < int3["kl"]
    assert int4["bits_per_weight"]["codes"] == 4 and int3["bits_per_weight"]["codes"] == 3
    for evaluation in (int4, int3):
        stored = sum(path.stat().st_size for path in (tmp_path / "models" / evaluation["model"]).glob("*.safetensors"))
        assert 0 < stored - evaluation["stored_bytes"] < 200_000
    page = tmp_path / "models" / "report.html"
    assert record["report"] == str(page) and page.stat().st_size > 10**6 and page.with_suffix(".json").is_file()
    assert record["reply"] and record["compressions"]["int4"]["fallbacks"] == []


def test_the_demo_overwrites_nobody_elses_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "int4" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    monkeypatch.setattr("rarefy.api.open_model", lambda _: None)  # the model is not needed to refuse
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 2 and "holds something else" in result.stderr
    assert mine.read_text() == "mine"
