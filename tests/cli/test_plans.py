"""``rarefy eval --attention``, ``rarefy chat --attention`` and the attention recipes in ``rarefy recipes``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.conftest import one_json, one_sentence

Run = Callable[..., Any]
SMALL = "dense_below=0,block_q=8,block_k=8,max_density=1"
PLANS = ("--attention", f"oracle:density=1.0,{SMALL}", "--attention", f"random:density=0.3,dense_layers=[1],{SMALL}")


def test_eval_of_plans(run: Run, llama: Path, text: Path) -> None:
    common = ("eval", llama, "--data", text, "--context", 48, "--windows", 2, *PLANS)
    table = run(*common)
    assert table.exit_code == 0
    assert "density" in table.stdout.splitlines()[0] and "(reference)" in table.stdout.splitlines()[1]
    records = one_json(run(*common, "--json"))
    whole, some = records
    assert whole["attention_density"] == 1.0 and whole["kl"] < 1e-5
    assert 0.3 <= some["attention_density"] < 0.9 and some["kl"] > whole["kl"]
    assert records[0]["reference"]["attention_density"] is None


def test_plans_are_refused_in_a_sentence(run: Run, llama: Path, text: Path) -> None:
    common = ("eval", llama, "--data", text, "--context", 24)
    assert "did you mean 'oracle'" in one_sentence(run(*common, "--attention", "orakle"))
    found = one_sentence(run(*common, "--attention", "oracle:density"))
    assert "--attention 'oracle:density' is not of the form" in found
    assert "goes with neither --kv" in one_sentence(run(*common, "--attention", "oracle", "--kv", "fp8"))


def test_chat_attends_by_a_plan(run: Run, llama: Path) -> None:
    common = ("chat", llama, "--prompt", "a b c d e f g h", "--max-new-tokens", 4, "--json")
    dense, planned = (one_json(run(*common, *more)) for more in ((), ("--attention", f"oracle:density=1.0,{SMALL}")))
    assert planned["reply"] == dense["reply"]


def test_recipes_of_attention_are_shown(run: Run) -> None:
    listed = one_json(run("recipes", "--json"))
    assert listed["xattention"].startswith("attention: XAttention (Xu et al. 2025)")
    shown = run("recipes", "quest_pages")
    assert "dense_below" in shown.stdout and "budget" in shown.stdout
