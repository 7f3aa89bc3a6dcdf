"""``rarefy report`` and ``rarefy compare``, from the results of the commands before them to the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from rarefy.core.errors import OptionError
from rarefy.integrations.transformers.differences import compare_layers
from tests.cli.conftest import Run, one_json, one_sentence


def test_compare_sets_two_models_side_by_side(run: Run, models: Path, text: Path) -> None:
    dense, small = models / "llama", models / "small"
    given = ("--data", text, "--context", 16, "--windows", 2, "--device", "cpu")
    table = run("compare", dense, small, *given)
    assert table.exit_code == 0 and "llama (reference)" in table.stdout and "difference" in table.stdout
    record = one_json(run("compare", dense, small, *given, "--json"))
    layers = record["differences"][0]["layers"]
    assert record["kind"] == "findings" and len(layers) == 15
    for layer in layers:
        changed = layer["name"] != "lm_head"
        assert (0.01 < layer["difference"] < 0.3) == changed and (layer["second_bits"] < 8) == changed
    same = one_json(run("compare", small, small, "--reference", dense, *given, "--json"))
    first, second = same["comparisons"][0]["candidates"]
    assert first["kl"] == second["kl"] > 0
    assert all(layer["difference"] == 0 for layer in same["differences"][0]["layers"])


def test_models_that_have_nothing_in_common(models: Path) -> None:
    with pytest.raises(OptionError, match="'llama' and 'bert' have no layer of the same name"):
        compare_layers(models / "llama", models / "bert")


def test_results_become_a_page(run: Run, models: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    results = tmp_path / "results"
    results.mkdir()
    given = ("--data", text, "--context", 16, "--windows", 2, "--device", "cpu", "--json")
    few = ("--set", "num_bits=3", "--set", "group_size=16", "--device", "cpu", "--json")
    commands = {
        "compress": ("compress", models / "llama", "--out", tmp_path / "three", *few),
        "eval": ("eval", models / "small", tmp_path / "three", "--reference", models / "llama", *given),
        "compare": ("compare", models / "small", tmp_path / "three", *given),
    }
    for name, command in commands.items():
        done = run(*command)
        assert done.exit_code == 0, done.stderr
        (results / f"{name}.json").write_text(done.stdout)
    page = tmp_path / "page.html"
    record = one_json(run("report", results, "--out", page, "--title", "Mine", "--json"))
    assert record == {"page": str(page), "data": str(tmp_path / "page.json")}
    html = page.read_text()
    assert "<h1>Mine</h1>" in html and "rarefy" in html and "times smaller" in html
    told = run("report", tmp_path / "page.json", "--out", tmp_path / "again.html")
    assert told.exit_code == 0 and str(tmp_path / "again.html") in told.stdout
    assert (tmp_path / "again.html").read_text().count("<article class=\"card\">") == 3


def test_one_command_makes_the_page_of_all_recipes_from_committed_results(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    results = Path(__file__).parents[2] / "docs" / "results"
    files = sorted(results.rglob("*.json"))
    assert files
    one_json(run("report", *files, "--out", tmp_path / "page.html", "--json"))
    html = (tmp_path / "page.html").read_text()
    for words in ("Bits and quality: lab-29m", "gptq", "awq", "spqr", "is the best of"):
        assert words in html


def test_what_is_no_result_is_refused(run: Run, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    sentence = one_sentence(run("report", models / "small" / "config.json", "--out", tmp_path / "page.html"))
    assert "does not say which result" in sentence and not (tmp_path / "page.html").exists()
