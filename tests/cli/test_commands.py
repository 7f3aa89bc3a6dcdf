"""Every command: results on stdout and all else on stderr, one JSON value on request, exit codes, nothing half-done."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rarefy
from rarefy.cli import common, recipes
from rarefy.contracts import attention_recipes, kv_recipes, weight_recipes
from rarefy.kernels import cpu
from rarefy.recipes import discover
from tests.cli.conftest import Run, one_json, one_sentence

COMMANDS = (
    "compress", "train", "eval", "compare", "report", "attention", "chat", "bench", "tune", "inspect", "recipes",
    "info", "demo",
)  # fmt: skip
PARTS = {"total", "codes", "scales", "tables", "indices", "values"}
EVALUATION = {
    "perplexity", "kl", "top1_agreement", "tokens", "bits_per_weight", "stored_bytes", "dense_bytes",
}  # fmt: skip
FEW = ("--set", "num_bits=4", "--set", "group_size=16", "--device", "cpu")


# Help


@pytest.mark.parametrize("arguments", [(), *((name,) for name in COMMANDS)], ids=["app", *COMMANDS])
def test_help_says_what_a_command_is_for(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--help")
    assert result.exit_code == 0 and result.stderr == ""
    assert "Usage: rarefy" in result.stdout
    for name in COMMANDS if not arguments else ("--json",):
        assert name in result.stdout


def test_help_imports_neither_torch_nor_transformers(shell: Callable[..., Any]) -> None:
    about = shell()
    code = (
        "import sys\nfrom rarefy.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*sorted({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=about["env"], text=True, capture_output=True, check=True)
    assert done.stderr.strip() == "" and "compress" in done.stdout


def test_the_version_is_told(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.stdout == f"rarefy {rarefy.__version__}\n"


def test_listing_recipes_does_not_load_a_compiler(shell: Callable[..., Any]) -> None:
    code = (
        "import sys\nfrom rarefy.cli import app\n"
        "try:\n    app(['recipes'])\nexcept SystemExit:\n    pass\n"
        "print(*sorted({'transformers', 'torch._dynamo'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=shell()["env"], text=True, capture_output=True, check=True
    )
    assert done.stderr.strip() == "" and "gptq" in done.stdout


# Compress


def test_compress_writes_a_model_and_says_what_it_cost(run: Run, models: Path, tmp_path: Path) -> None:
    result = run("compress", models / "llama", "--out", tmp_path / "out", *FEW)
    assert result.exit_code == 0
    for word in ("recipe", "bits/weight", "whole model", "layer error", "took", "peak memory"):
        assert word in result.stdout
    assert rarefy.load(tmp_path / "out") is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_compress_as_json_has_sizes_times_errors_and_fallbacks(run: Run, models: Path, tmp_path: Path) -> None:
    report = one_json(run("compress", models / "llama", "--out", tmp_path / "out", *FEW, "--json"))
    assert set(report["bits_per_weight"]) >= PARTS
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < report["stored_bytes"] < files < report["dense_bytes"]
    assert report["seconds"] > 0 and report["peak_bytes"] > 10**7
    assert len(report["layers"]) == 14
    assert all(0 < layer["relative_error"] < 0.2 and layer["name"] for layer in report["layers"])
    assert report["fallbacks"] == [] and report["skipped"] == {"lm_head": "output head"}


def test_every_fallback_is_told(run: Run, models: Path, tmp_path: Path) -> None:
    file = tmp_path / "falling.py"
    file.write_text(
        "from rarefy.contracts import Solution, WeightRecipe, weight_recipes\n"
        "from rarefy.formats.grids import IntegerGrid\nfrom rarefy.solvers.rtn import round_to_nearest\n"
        "@weight_recipes.register('test_falling')\nclass Falling(WeightRecipe):\n"
        "    def solve(self, layer):\n"
        "        return Solution([round_to_nearest(layer.weight, IntegerGrid(num_bits=4))], ['took the long way'])\n"
    )
    result = run("compress", models / "llama", "--recipe", file, "--out", tmp_path / "a", "--device", "cpu", "--json")
    report = one_json(result)
    assert len(report["fallbacks"]) == 14 and all("took the long way" in note for note in report["fallbacks"])
    assert result.stderr.count("fallback: ") == 1, "one line for one reason, however many layers have it"
    assert "fallback: 14 layers, the first model.layers.0." in result.stderr


def test_calibration_data_that_nobody_needs_is_mentioned(run: Run, models: Path, text: Path, tmp_path: Path) -> None:
    result = run("compress", models / "llama", "--out", tmp_path / "out", *FEW, "--data", text, "--json")
    assert "data-free" in result.stderr
    assert any("was not used" in note for note in one_json(result)["notes"])


def test_shards_presets_and_replacing_a_folder(run: Run, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sharded = ("--max-shard-size", "20kB")
    one_json(run("compress", models / "llama", "--out", out, "--recipe", "nf4", "--device", "cpu", *sharded, "--json"))
    assert len(list(out.glob("*.safetensors"))) > 1
    one_json(run("compress", models / "llama", "--out", out, *FEW, "--overwrite", "--json"))
    assert len(list(out.glob("*.safetensors"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# Evaluate


def test_eval_as_json_is_one_object_for_one_model(run: Run, models: Path, text: Path) -> None:
    record = one_json(
        run("eval", models / "small", "--data", text, "--context", 16, "--windows", 3, "--device", "cpu", "--json")
    )
    assert set(record) >= EVALUATION and set(record["bits_per_weight"]) >= PARTS
    assert record["tokens"] == 3 * 15 and record["perplexity"] > 1
    assert record["kl"] is None and record["top1_agreement"] is None and record["reference"] is None


def test_eval_of_several_models_is_a_list_against_one_reference(run: Run, models: Path, text: Path) -> None:
    dense, small = models / "llama", models / "small"
    given = ("--reference", dense, "--data", text, "--context", 32, "--windows", 4, "--device", "cpu", "--json")
    records = one_json(run("eval", dense, small, *given))
    assert [record["model"] for record in records][1] == "small"
    for record in records:
        assert set(record) >= EVALUATION and set(record["bits_per_weight"]) >= PARTS
        assert record["reference"]["perplexity"] == records[0]["perplexity"]
    same, near = records
    assert same["kl"] == 0 and same["top1_agreement"] == 1
    assert same["bits_per_weight"]["total"] == same["bits_per_weight"]["values"] == 32
    assert same["stored_bytes"] == same["dense_bytes"] == near["dense_bytes"] > near["stored_bytes"]
    assert 0 < near["kl"] < 0.1 and near["bits_per_weight"]["codes"] > 4


def test_eval_table_names_the_protocol(run: Run, models: Path, text: Path) -> None:
    result = run(
        "eval", models / "small", "--reference", models / "llama", "--data", text, "--context", 16, "--windows", 2,
        "--device", "cpu", "--dtype", "float32",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "llama (reference)" in result.stdout and "perplexity" in result.stdout
    assert "context 16, 2 windows, no BOS, float32, letters.txt" in result.stdout and "30 predicted" in result.stdout


def test_eval_asks_about_long_contexts(run: Run, models: Path, tmp_path: Path) -> None:
    prose = tmp_path / "prose.txt"
    prose.write_text(" ".join("a b c d e f g h i j k l m n." for _ in range(60)))
    given = ("--suite", "long", "--tasks", "passkey", "--data", prose, "--length", 256, "--device", "cpu")
    refused = run("eval", models / "llama", *given)
    assert "more than the 64 positions of 'llama'" in one_sentence(refused)
    assert "'poem' is not a task" in one_sentence(run("eval", models / "llama", *given[:3], "poem", *given[4:]))
    record = {"context": "a b c d e f g h i j k l", "question": "a", "answer": "b c", "answer_prefix": " a"}
    (tmp_path / "own.jsonl").write_text(json.dumps(record))
    asked = ("--tasks", "", "--session-file", tmp_path / "own.jsonl", "--data", prose, "--chunk", 4, "--device", "cpu")
    cache = "kivi:num_bits=2,group_size=8,residual=8"
    (coded,) = one_json(run("eval", models / "llama", "--suite", "long", *asked, "--kv", cache, "--json"))["candidates"]
    assert coded["model"].endswith(f"llama, {cache}") and coded["answers"][0]["kl"] > 0
    assert "--suite 'short' is unknown" in one_sentence(run("eval", models / "llama", "--suite", "short"))


def test_eval_says_when_a_plan_was_never_sparse(run: Run, models: Path, text: Path) -> None:
    given = ("--data", text, "--context", 32, "--windows", 1, "--device", "cpu", "--json", "--attention")
    plan = "random:density=0.3,block_q=8,block_k=8,max_density=1"
    assert "stayed dense in every pass (below 4096 keys)" in run("eval", models / "llama", *given, plan).stderr
    sparse = run("eval", models / "llama", *given, plan + ",dense_below=0")
    assert "stayed dense" not in sparse.stderr and one_json(sparse)["attention_density"] < 1


def test_the_whole_text_and_the_fast_executor(run: Run, models: Path, text: Path) -> None:
    given = ("--data", text, "--context", 64, "--windows", 0, "--executor", "fast", "--device", "cpu", "--json")
    result = run("eval", models / "small", *given)
    record = one_json(result)
    assert record["tokens"] == (700 // 64) * 63
    if cpu.available():
        assert record["protocol"]["executor"] == "fast"
    else:
        assert record["protocol"]["executor"] == "exact" and "runs exact" in result.stderr


# Inspect, recipes, info


def test_inspect_shows_how_each_layer_is_stored(run: Run, models: Path) -> None:
    summary = one_json(run("inspect", models / "small", "--json"))
    stored = {layer["name"]: layer for layer in summary["layers"]}
    layer = stored["model.layers.0.mlp.down_proj"]
    assert layer["stored_as"] == "integer 4 bit g16 integer-zero" and 4 < layer["bits_per_weight"] < 7
    assert stored["lm_head"]["stored_as"] == "dense" and stored["lm_head"]["bits_per_weight"] == 32
    assert summary["compressed"] and set(summary["bits_per_weight"]) >= PARTS
    shown = run("inspect", models / "small")
    assert "bits/weight" in shown.stdout and shown.stderr == ""


def test_inspect_says_that_a_head_is_tied(run: Run, models: Path) -> None:
    summary = one_json(run("inspect", models / "tied", "--json"))
    head = next(layer for layer in summary["layers"] if layer["name"] == "lm_head")
    assert head["stored_as"] == "tied to model.embed_tokens.weight" and head["bytes"] == 0
    line = next(line for line in run("inspect", models / "tied").stdout.splitlines() if line.startswith("lm_head"))
    assert line.split()[-2:] == ["-", "-"]


def test_recipes_lists_methods_and_presets(run: Run) -> None:
    table = one_json(run("recipes", "--json"))
    assert "rtn" in table and table["nf4"].startswith("preset: 4-bit normal float")
    assert "mixed_int" in run("recipes").stdout


def test_recipes_shows_options_as_they_are_typed(run: Run) -> None:
    about = one_json(run("recipes", "rtn", "--json"))
    assert about["options"]["group_size"] == {"type": "int | null", "default": 128}
    assert about["options"]["clip"] == {"type": "none | mse", "default": "none"}
    assert about["options"]["format"]["type"].startswith("int | lut | ternary") and about["needs"] == []
    shown = run("recipes", "rtn").stdout
    assert "Union" not in shown and "Literal" not in shown and "data-free" in shown


def test_every_option_of_every_recipe_is_explained(run: Run) -> None:
    discover()
    for registry in (weight_recipes, kv_recipes, attention_recipes):
        for name in registry:
            if not registry.get(name).__module__.startswith("rarefy."):
                continue  # other tests register recipes of their own
            said = "\n".join(recipes.explanations(registry.get(name)))
            unsaid = [
                option for option in registry.get(name).model_fields
                if option not in ("num_bits", "group_size") and not re.search(rf"\b{option}\b", said)
            ]  # fmt: skip
            assert not unsaid, f"{name}: say what {unsaid} mean"
    assert "``rows_per_lut``" in run("recipes", "rtn").stdout


def test_recipes_shows_a_preset_and_a_required_option(run: Run, tmp_path: Path) -> None:
    assert "group_size: 128" in run("recipes", "int4").stdout
    assert one_json(run("recipes", "int4", "--json"))["preset"]["rules"][0]["options"]["num_bits"] == 4
    file = tmp_path / "strict.py"
    file.write_text(
        "from rarefy.contracts import Solution, WeightRecipe, weight_recipes\n"
        "@weight_recipes.register('test_strict')\nclass Strict(WeightRecipe):\n    amount: int\n"
        "    def solve(self, layer):\n        return Solution([])\n"
    )
    assert "amount" in one_sentence(run("compress", tmp_path, "--recipe", file, "--out", tmp_path / "o"))
    assert one_json(run("recipes", "test_strict", "--json"))["options"]["amount"]["default"] == "required"


def test_info_names_versions_and_kernels(run: Run) -> None:
    facts = one_json(run("info", "--json"))
    assert facts["rarefy"] == rarefy.__version__ and facts["packages"]["torch"] == torch.__version__
    assert facts["kernels"] and facts["cpu"]["threads"] >= 1
    shown = run("info").stdout
    assert "kernels" in shown and "cache" in shown


# Chat


def test_starting_collects_no_garbage() -> None:
    import gc

    assert gc.isenabled()
    with common.starting():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with common.starting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_chat_streams_an_answer(run: Run, models: Path) -> None:
    given = ("chat", models / "small", "--prompt", "a b c", "--max-new-tokens", 5, "--device", "cpu")
    result = run(*given)
    assert result.exit_code == 0 and "tokens/s" in result.stderr and "note" not in result.stderr
    record = one_json(run(*given, "--json"))
    assert record["prompt"] == "a b c" and 1 <= record["tokens"] <= 5
    assert result.stdout.split() == record["reply"].split() and record["reply"]


def test_chat_without_a_template_continues_the_text(run: Run, models: Path) -> None:
    result = run("chat", models / "plain", "--prompt", "a b c", "--max-new-tokens", 3, "--device", "cpu")
    assert result.exit_code == 0 and "no chat template" in result.stderr and result.stdout.strip()


def test_a_conversation_remembers_its_turns(run: Run, models: Path) -> None:
    given = ("--max-new-tokens", 4, "--device", "cpu")
    result = run("chat", models / "llama", *given, stdin="a b c\nd e\n")
    assert result.exit_code == 0
    first, second = (line.strip() for line in result.stdout.strip().splitlines())
    assert first == one_json(run("chat", models / "llama", "--prompt", "a b c", *given, "--json"))["reply"]
    history = f"a b c {first} d e"
    assert second == one_json(run("chat", models / "llama", "--prompt", history, *given, "--json"))["reply"]
    assert run("chat", models / "llama", *given, stdin="a b\n\nc d\n").stdout.count("\n") == 1


def test_an_answer_ends_where_the_positions_do(run: Run, models: Path) -> None:
    result = run("chat", models / "gpt2", "--prompt", "a b c", "--max-new-tokens", 100, "--device", "cpu", "--json")
    assert one_json(result)["tokens"] <= 61 and "ends after 61 tokens" in result.stderr
    long = " ".join("a" * 64)
    assert "64 positions" in one_sentence_of_chat(run("chat", models / "llama", "--prompt", long, "--device", "cpu"))


def one_sentence_of_chat(result: Any) -> str:
    assert result.exit_code == 2 and result.stdout == ""
    return str(result.stderr)


def test_chat_with_an_encoder_decoder(run: Run, models: Path) -> None:
    result = run("chat", models / "t5", "--prompt", "a b c", "--max-new-tokens", 4, "--device", "cpu", "--json")
    assert one_json(result)["tokens"] <= 4


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("--json",), "--prompt"), (("--prompt", " "), "empty"), (("--prompt", "a", "--device", "meta"), "meta")],
    ids=["json", "empty", "device"],
)
def test_chat_refuses(run: Run, models: Path, arguments: tuple[str, ...], word: str) -> None:
    assert word in one_sentence(run("chat", models / "llama", *arguments))


def test_chat_refuses_a_model_that_does_not_speak(run: Run, models: Path) -> None:
    assert "does not generate" in run("chat", models / "bert", "--prompt", "a").stderr


# Bad input: exit code 2, one sentence, nothing written

BAD_COMPRESS: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown recipe": (("--recipe", "rtm"), "did you mean 'rtn'?"),
    "recipe of another family": (("--recipe", "kivi"), "use it as rarefy.kv_cache(model, 'kivi') or rarefy eval --kv"),
    "unknown preset": (("--recipe", "nf5"), "did you mean 'nf4'?"),
    "missing recipe file": (("--recipe", "none.yaml"), "none.yaml"),
    "missing recipe program": (("--recipe", "none.py"), "none.py"),
    "recipe file of another kind": (("--recipe", "none.json"), "none.json"),
    "unknown recipe option": (("--set", "num_bit=4"), "did you mean 'num_bits'?"),
    "bad value": (("--set", "num_bits=9"), "num_bits"),
    "bad word": (("--set", "clip=best"), "clip"),
    "useless option": (("--set", "format=nf4", "--set", "num_bits=3"), "no effect"),
    "not key=value": (("--set", "num_bits"), "key=value"),
    "no key": (("--set", "=4"), "key=value"),
    "value and options": (("--set", "num_bits=4", "--set", "num_bits.more=1"), "num_bits"),
    "date that is none": (("--set", "num_bits=2026-13-45"), "num_bits"),
    "unknown device": (("--device", "tpu9"), "tpu9"),
    "device of no use": (("--device", "meta"), "meta"),
    "shard size": (("--max-shard-size", "lots"), "lots"),
    "no shard size": (("--max-shard-size", "0GB"), "0GB"),
    "revision of a folder": (("--revision", "main"), "revision"),
}


@pytest.mark.parametrize(("arguments", "word"), BAD_COMPRESS.values(), ids=BAD_COMPRESS)
def test_compress_refuses(run: Run, models: Path, tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    assert word in one_sentence(run("compress", models / "llama", "--out", tmp_path / "out", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_compress_refuses_a_gpu_that_is_not_there(run: Run, models: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "--device cpu" in one_sentence(
        run("compress", models / "llama", "--out", tmp_path / "o", "--device", "cuda")
    )


@pytest.mark.parametrize("command", ["compress", "eval", "chat", "inspect"])
def test_a_missing_model(run: Run, command: str, text: Path, tmp_path: Path) -> None:
    more = {"compress": ("--out", tmp_path / "out"), "eval": ("--data", text), "chat": ("--prompt", "a")}
    assert "no-such-model" in one_sentence(run(command, "no-such-model", *more.get(command, ())))
    assert list(tmp_path.iterdir()) == []


def test_a_model_compressed_already(run: Run, models: Path, tmp_path: Path) -> None:
    assert "compressed already" in one_sentence(run("compress", models / "small", "--out", tmp_path / "out", *FEW))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_stays_as_it_is(run: Run, models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "--overwrite" in one_sentence(run("compress", models / "llama", "--out", tmp_path / "out", *FEW))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_is_not_replaced_by_its_own_compression(run: Run, llama: Path) -> None:
    before = sorted(path.name for path in llama.iterdir())
    for out in (llama, llama.parent):
        assert "holds the model itself" in one_sentence(run("compress", llama, "--out", out, "--overwrite", *FEW))
    assert sorted(path.name for path in llama.iterdir()) == before


def test_a_damaged_weight_leaves_nothing(run: Run, llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj" in one_sentence(run("compress", llama, "--out", tmp_path / "out", *FEW))
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--dtype", "int7"), "int7"),
        (("--executor", "slow"), "slow"),
        (("--context", "16", "--device", "tpu9"), "tpu9"),
        (("--context", "65"), "64 positions"),
        (("--context", "64", "--windows", "99"), "at most 10 windows"),
        (("--data", "none.txt"), "none.txt"),
        (("--data", "text.pdf"), "text.pdf"),
        (("--kv", "kivi", "--reference", "x"), "--reference has no effect with --kv"),
        (("--few-shot", "2"), "--few-shot has no effect on text"),
        (("--suite", "long", "--context", "64"), "has no effect with --suite long"),
    ],
    ids=[
        "dtype", "executor", "device", "context", "short text", "missing text", "kind of text", "reference of caches",
        "shots without tasks", "context of a suite",
    ],
)
def test_eval_refuses(run: Run, models: Path, text: Path, arguments: tuple[str, ...], word: str) -> None:
    given = ("--data", text, "--windows", "2") if "--data" not in arguments else ("--windows", "2")
    assert word in one_sentence(run("eval", models / "small", *given, *arguments))


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_eval_refuses_what_does_not_predict(run: Run, models: Path, text: Path, name: str) -> None:
    said = one_sentence(run("eval", models / name, "--data", text, "--context", 16, "--windows", 1, "--device", "cpu"))
    assert name in said and "does not predict next tokens" in said


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("eval", "x", "--context", "1"), "--context"),
        (("eval", "x", "--windows", "many"), "--windows"),
        (("compress", "x", "--out", "y", "--fast"), "--fast"),
        (("compress", "x"), "--out"),
        (("compress", "x", "--out", "y", "--seed", str(2**64)), "--seed"),
        (("decompress", "x"), "decompress"),
        (("eval",), "models"),
    ],
    ids=["range", "number", "unknown option", "missing option", "seed", "unknown command", "no model"],
)
def test_what_the_parser_refuses(run: Run, arguments: tuple[str, ...], word: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert len(errors) == 1 and word in errors[0].lower()


# A failing machine: exit code 1


@pytest.mark.parametrize("how", ["oserror", "safetensors"])
def test_a_full_disk(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    import safetensors
    import safetensors.torch

    def full(*_: object, **__: object) -> None:
        if how == "oserror":
            raise OSError(28, "No space left on device", "part")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for work in ((), ("--work-dir", tmp_path / "work")):
        monkeypatch.setattr(sys, "argv", ["rarefy", "compress", *map(str, work)])
        said = one_sentence(run("compress", models / "llama", "--out", tmp_path / "out", *FEW, *work), code=1)
        assert said.startswith("No space left on device")
        assert said.endswith(f"Go on with: rarefy compress --work-dir {tmp_path / 'work'}" if work else "half-written.")
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert not list((tmp_path / "work").glob("*.safetensors"))


@pytest.mark.parametrize(
    "failure", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")], ids=str
)
def test_no_memory(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def none(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("rarefy.integrations.transformers.description.describe", none)
    assert "Out of memory" in one_sentence(run("inspect", models / "llama"), code=1)


def test_a_fault_of_our_own_is_not_hidden(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("rarefy.integrations.transformers.description.describe", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("inspect", models / "llama")


# Interruption and closed pipes

SLOW = """
import time
from rarefy.contracts import Solution, WeightRecipe, weight_recipes
from rarefy.formats.grids import IntegerGrid
from rarefy.solvers.rtn import round_to_nearest

@weight_recipes.register("test_slow")
class Slow(WeightRecipe):
    seconds: float = 0.0

    def solve(self, layer):
        print("solving", flush=True)
        time.sleep(self.seconds)
        return Solution([round_to_nearest(layer.weight, IntegerGrid(num_bits=4, group_size=16, zero="integer"))])
"""


def test_ctrl_c_leaves_nothing_and_says_how_to_go_on(shell: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = (
        "compress", models / "llama", "--recipe", tmp_path / "slow.py", "--set", "seconds=0.1",
        "--out", tmp_path / "out", "--work-dir", tmp_path / "work", "--device", "cpu",
    )  # fmt: skip
    process = subprocess.Popen(**shell(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "solving\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1].startswith("interrupted. Go on with: ")
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slow.py", "work"]
    kept = len(list((tmp_path / "work").glob("*.safetensors")))
    assert kept >= 2

    about = shell()
    again = subprocess.run(
        said.strip().splitlines()[-1].partition("Go on with: ")[2], shell=True, cwd=tmp_path, env=about["env"],
        text=True, capture_output=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("solving") == 14 - kept
    whole = rarefy.load(tmp_path / "out")
    straight = rarefy.load(models / "small")
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(whole(tokens).logits, straight(tokens).logits)


def test_ctrl_c_in_a_conversation(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", pressed)
    result = run("chat", models / "llama", "--device", "cpu")
    assert result.exit_code == 130 and result.stderr.splitlines()[-1] == "interrupted."


@pytest.mark.parametrize("arguments", [("recipes",), ("--help",)], ids=" ".join)
def test_a_reader_that_goes_away(shell: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(**shell(*arguments), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode in (0, 1) and done.stderr == ""


def test_json_of_numbers_that_json_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    common.print_json({"a": [float("nan"), float("inf"), 1.5], "b": (float("-inf"),)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": [None]}


def test_options_are_yaml_and_may_be_nested() -> None:
    pairs = ["a=3", "b=null", "c=true", "d=[1, 2]", "e.f=x", "e.g=0.5", "h=a=b", "i=2026-13-45", "j=["]
    assert common.parse_options(pairs) == {
        "a": 3, "b": None, "c": True, "d": [1, 2], "e": {"f": "x", "g": 0.5}, "h": "a=b", "i": "2026-13-45", "j": "[",
    }  # fmt: skip


def test_a_hint_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bin" / "rarefy"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "/nowhere")
    assert common.shell_line("chat", "my model") == "bin/rarefy chat 'my model'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert common.shell_line("chat") == "rarefy chat"
