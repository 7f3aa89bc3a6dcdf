"""``rarefy eval --kv`` and the KV cache recipes in ``rarefy recipes``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.conftest import one_json, one_sentence

Run = Callable[..., Any]
CACHES = ("--kv", "kivi:num_bits=4,group_size=4,residual=4", "--kv", "fp8")


def test_eval_of_caches(run: Run, llama: Path, text: Path) -> None:
    common = ("eval", llama, "--data", text, "--context", 24, "--windows", 2, "--chunk", 8, *CACHES)
    table = run(*common)
    assert table.exit_code == 0
    lines = table.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["cache", "dense", CACHES[1], "fp8"]
    assert "chunked, 8 tokens at a time; context 24, 2 windows, float32" in lines[-1]
    record = one_json(run(*common, "--regime", "decode", "--prefill", 5, "--json"))
    assert record["kind"] == "caches"
    assert record["protocol"]["regime"] == "decode"
    assert record["tokens"] == 2 * (24 - 1 - 5)
    assert all(cache["bits"]["total"] > 4 for cache in record["caches"])


def test_eval_of_caches_refuses_in_a_sentence(run: Run, llama: Path, text: Path) -> None:
    assert "--kv compares caches of one model, not of 2" in one_sentence(run("eval", llama, llama, *CACHES))
    assert "--regime 'fast' is unknown" in one_sentence(run("eval", llama, *CACHES, "--regime", "fast"))
    found = run("eval", llama, "--data", text, "--context", 24, "--kv", "kivi:bits=2")
    assert "did you mean 'num_bits'" in one_sentence(found) or "'bits' is not an option" in one_sentence(found)


def test_recipes_of_caches_are_shown(run: Run) -> None:
    listed = one_json(run("recipes", "--json"))
    assert listed["kivi"].startswith("KV cache: KIVI (Liu et al. 2024)")
    shown = run("recipes", "kv_quant")
    assert "rotated_keys" in shown.stdout and "needs fisher, samples" in shown.stdout
