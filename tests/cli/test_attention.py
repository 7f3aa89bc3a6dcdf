"""``rarefy train`` and ``rarefy attention``: gates from the command line, and the page that shows what they choose."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run, one_json, one_sentence

FEW = ("--steps", 2, "--seq-len", 32, "--device", "cpu", "--set", "block_q=8", "--set", "block_k=8")


def test_a_model_learns_where_to_look_and_shows_it(
    run: Run, models: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    out, page = tmp_path / "gates", tmp_path / "page.html"
    record = one_json(run("train", models / "llama", "--out", out, "--data", text, *FEW, "--json"))
    assert record["kind"] == "training" and record["recipe"] == "seer_attention" and record["steps"] == 2
    assert (out / "attention.safetensors").is_file() and record["bytes"] > 0
    shown = ("attention", out, "--text", text, "--tokens", 64, "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["rarefy", "attention", "gates"])
    said = run(*shown, "--out", page)
    assert said.exit_code == 0 and "density" in said.stdout
    assert "rarefy attention gates" in page.read_text("utf-8"), "the page says how it was made"
    facts = one_json(run(*shown, "--out", page, "--layers", "1", "--plan", "oracle:density=0.5", "--json"))
    assert facts["plan"] == "oracle:density=0.5" and 0 < facts["density"] <= 1 and facts["recall"] <= 1
    assert facts["page"] == str(page)
    measured = run("eval", out, "--data", text, "--windows", 1, "--context", 32, "--device", "cpu", "--json")
    found = one_json(measured)
    assert found["attention_density"] == 1 and "stayed dense in every pass" in measured.stderr
    assert found["bits_per_weight"]["total"] == pytest.approx(32, rel=0.01) and found["stored_bytes"] > 0
    table = run("train", models / "llama", "--out", out, "--data", text, *FEW, "--samples", 1, "--overwrite")
    assert table.exit_code == 0 and "loss" in table.stdout


def test_what_cannot_be_is_one_sentence(run: Run, models: Path, text: Path, tmp_path: Path) -> None:
    train = ("train", models / "llama", "--out", tmp_path / "out", "--data", text, "--device", "cpu")
    assert "nothing to train" in one_sentence(run(*train, "--recipe", "sink_local"))
    assert "'pool' is not an option; did you mean 'pools'?" in one_sentence(run(*train, "--set", "pool=mean"))
    shown = ("attention", models / "llama", "--text", text, "--tokens", 64, "--device", "cpu")
    page = ("--out", tmp_path / "page.html")
    assert "no attention plan of its own" in one_sentence(run(*shown, *page))
    assert "Layer 7 does not exist" in one_sentence(run(*shown, *page, "--plan", "oracle", "--layers", "7"))
    assert "is not a list of numbers" in one_sentence(run(*shown, *page, "--plan", "oracle", "--layers", "x"))
    assert "not a page" in one_sentence(run(*shown, "--plan", "oracle", "--out", tmp_path / "page.txt"))
