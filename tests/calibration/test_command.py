"""``rarefy compress`` with a recipe that calibrates, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import rarefy
from rarefy.calibration.capture import Group
from rarefy.core.memory import peak_bytes, reset_peak
from tests.zoo import dense_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    with torch.random.fork_rng(devices=[]):
        dense_folder("llama", root / "dense")
    tiny_tokenizer().save_pretrained(root / "dense")
    (root / "text.txt").write_text("a b c d e f g h i j k l m n o p " * 40)
    return root


def run(place: Path, *arguments: str) -> Result:
    from rarefy.cli import app

    options = ["--data", str(place / "text.txt"), "--samples", "8", "--seq-len", "16", "--device", "cpu"]
    return CliRunner().invoke(app, ["compress", str(place / "dense"), *options, *arguments])


def test_the_plan_comes_first_and_the_report_last(place: Path, tmp_path: Path) -> None:
    work = ["--work-dir", str(tmp_path / "work"), "--set", "group_size=16"]
    result = run(place, "--recipe", "gptq", "--out", str(tmp_path / "one"), "--json", *work)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0].startswith("plan: one block ")
    report = json.loads(result.stdout)
    assert len(report["layers"]) == 14 and all(0 < layer["output_error"] < 0.3 for layer in report["layers"])
    assert any(note.startswith("calibrated on") and note.endswith("8 x 16 tokens") for note in report["notes"])
    again = run(place, "--recipe", "gptq", "--out", str(tmp_path / "two"), *work)
    assert again.exit_code == 0 and "layer error" in again.stdout
    one, two = ((tmp_path / name / "rarefy.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_what_goes_wrong_is_one_sentence(place: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "small")]
    (tmp_path / "one.txt").write_text("a")
    for arguments, said in (
        (["--recipe", "gptq", "--set", "num_bits=99"], "num_bits"),
        (["--recipe", "gptq", "--data", str(tmp_path / "absent.txt")], "absent.txt"),
        (["--recipe", "gptq", "--data", str(tmp_path / "one.txt")], "has 1 tokens; give a longer one (--data)"),
    ):
        result = run(place, *out, *arguments)
        assert result.exit_code == 2 and result.stdout == ""
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
    assert not (tmp_path / "small").exists()


def test_activations_that_are_no_numbers_name_the_layer(place: Path, tmp_path: Path) -> None:
    model = rarefy.load(place / "dense")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = float("inf")
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text((place / "text.txt").read_text())
    result = run(tmp_path, "--recipe", "gptq", "--out", str(tmp_path / "small"))
    assert result.exit_code == 2
    assert "'model.layers.1.mlp.gate_proj': its inputs are NaN or infinite" in result.stderr


def test_statistics_of_one_block_at_a_time(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """What was gathered for a block is gone before the next one's is."""
    import weakref

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = [0]
    original = Group.of.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, *arguments: Any) -> Group:
        group: Group = original(cls, *arguments)
        alive.update(group.inputs.values())
        most[0] = max(most[0], len(alive))
        return group

    monkeypatch.setattr(Group, "of", classmethod(counted))
    assert run(place, "--recipe", "gptq", "--out", str(tmp_path / "small")).exit_code == 0
    assert most[0] == 4  # inputs of q, k and v; of o; of gate and up; of down


def test_peak_memory_is_that_of_the_job(tmp_path: Path) -> None:
    """Not what the process took before."""
    large = torch.ones(60_000_000)
    before = peak_bytes()
    del large
    reset_peak()
    assert before - peak_bytes() > 150_000_000
