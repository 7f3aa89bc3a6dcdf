"""``rarefy eval --attention``, ``rarefy chat --attention`` and the attention recipes in ``rarefy recipes``."""

from __future__ import annotations

import json
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
    both = ("--attention", "oracle", "--kv", "fp8")
    assert "is measured chunked" in one_sentence(run(*common, *both, "--regime", "decode"))


def test_a_plan_and_a_coded_cache_are_measured_together(run: Run, llama: Path, text: Path) -> None:
    common = ("eval", llama, "--data", text, "--context", 48, "--windows", 1, "--chunk", 8, "--json")
    coded = ("--kv", "kivi:num_bits=8,group_size=8,residual=8")
    plan = ("--attention", f"random:density=0.3,{SMALL}")
    sparse, both = (one_json(run(*common, *plan, *more)) for more in ((), coded))
    assert both["model"].endswith("residual=8") and sparse["attention_density"] < 0.9
    assert both["attention_density"] == sparse["attention_density"]
    assert both["kl"] != sparse["kl"] and abs(both["kl"] / sparse["kl"] - 1) < 0.1


def test_long_contexts_are_asked_of_a_plan(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text(" ".join("a b c d e f g h i j k l m n." for _ in range(60)))
    record = {"context": "a b c d e f g h i j k l m n o p q r", "question": "a", "answer": "b c", "answer_prefix": " a"}
    (tmp_path / "own.jsonl").write_text(json.dumps(record))
    asked = ("--tasks", "", "--session-file", tmp_path / "own.jsonl", "--data", tmp_path / "prose.txt", "--chunk", 8)
    plans = ("--attention", f"oracle:density=1.0,{SMALL}", "--attention", f"random:density=0.1,{SMALL}")
    command = ("eval", llama, "--suite", "long", *asked, *plans, "--work-dir", tmp_path / "work", "--json")
    found = one_json(run(*command))
    whole, some = found["candidates"]
    assert "random" in some["model"] and found["reference"] is not None
    assert whole["answers"][0]["kl"] < 1e-5 < some["answers"][0]["kl"]
    assert [each["answers"] for each in one_json(run(*command))["candidates"]] == [whole["answers"], some["answers"]]


def test_chat_attends_by_a_plan(run: Run, llama: Path) -> None:
    common = ("chat", llama, "--prompt", "a b c d e f g h", "--max-new-tokens", 4, "--json")
    dense, planned = (one_json(run(*common, *more)) for more in ((), ("--attention", f"oracle:density=1.0,{SMALL}")))
    assert planned["reply"] == dense["reply"]


def test_recipes_of_attention_are_shown(run: Run) -> None:
    listed = one_json(run("recipes", "--json"))
    assert listed["xattention"].startswith("attention: XAttention (Xu et al. 2025)")
    shown = run("recipes", "quest_pages")
    assert "dense_below" in shown.stdout and "budget" in shown.stdout
