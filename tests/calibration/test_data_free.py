"""Folder in, folder out: the same bytes whatever the way, byte counts that add up, interruptions, and refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import rarefy
from rarefy.calibration.data_free import can_stream, compress_model_, weight_files
from rarefy.calibration.solve import WorkFolder
from rarefy.contracts import Layer, Recipe, Rule, Solution, WeightRecipe, weight_recipes
from rarefy.core.errors import CheckpointError, OptionError, RecipeError, SourceError, UnsupportedError
from rarefy.core.files import read_header
from rarefy.layers.manifest import read_manifest
from rarefy.layers.swap import compressed, exact_bytes, weight_bytes
from rarefy.recipes.weights.rtn import Rtn
from tests.zoo import FAMILIES, dense_folder, logits, same_bytes, tensors

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
SOURCE = str(Path(rarefy.__file__).parents[1])
INT4 = {"num_bits": 4, "group_size": 16}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    dense_folder("llama", tmp_path / "dense")
    return tmp_path / "dense"


def compress(source: Any, out: Path | None, recipe: Any = "rtn", **settings: Any) -> Any:
    if recipe == "rtn":
        settings.setdefault("options", INT4)
    return rarefy.compress(source, recipe, out=out, **({"device": "cpu"} | settings))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


# One result, whatever the way


@pytest.mark.compat
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "bert_labels"])
def test_streamed_and_in_memory_give_the_same_bytes(family: str, tmp_path: Path) -> None:
    model = dense_folder(family, tmp_path / "dense")
    assert can_stream(tmp_path / "dense")
    streamed = compress(tmp_path / "dense", tmp_path / "streamed")
    in_memory = compress(model, tmp_path / "memory")
    assert same_bytes(tensors(tmp_path / "streamed"), tensors(tmp_path / "memory"))
    same = ("bits_per_weight", "weights", "stored_bytes", "dense_bytes", "skipped", "fallbacks")
    assert [getattr(streamed, key) for key in same] == [getattr(in_memory, key) for key in same]
    assert {layer.name: layer.relative_error for layer in streamed.layers} == {
        layer.name: layer.relative_error for layer in in_memory.layers
    }


def test_twice_is_the_same_to_the_byte(dense: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        compress(dense, tmp_path / name, max_shard_size="20KB", seed=3)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_shards_of_the_source_do_not_matter(tmp_path: Path) -> None:
    model = dense_folder("llama", tmp_path / "dense")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(weight_files(tmp_path / "shards")) > 2
    for name in ("dense", "shards"):
        compress(tmp_path / name, tmp_path / f"small-{name}")
    assert same_bytes(tensors(tmp_path / "small-dense"), tensors(tmp_path / "small-shards"))


@pytest.mark.compat
def test_legacy_names_go_through_the_loaded_model(tmp_path: Path) -> None:
    """Old BERT checkpoints say gamma and beta; Transformers renames them, so a stream of the file would not load."""
    dense_folder("bert_labels", tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "modern")

    def age(found: dict[str, Tensor]) -> None:
        for name in [name for name in found if "LayerNorm" in name]:
            found[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = (
                found.pop(name)
            )

    rewrite(tmp_path / "dense", age)
    assert not can_stream(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "legacy")
    assert same_bytes(tensors(tmp_path / "modern"), tensors(tmp_path / "legacy"))
    results = [logits(rarefy.load(tmp_path / name), "bert_labels") for name in ("modern", "legacy")]
    assert torch.equal(*results)


@pytest.mark.compat
def test_an_architecture_that_transformers_does_not_know(dense: Path, tmp_path: Path) -> None:
    """Streamed by the shapes of its tensors; once the class is known, the result loads."""
    path = dense / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["NovelForCausalLM"]}))
    report = compress(dense, tmp_path / "small")
    assert len(report.layers) == 14
    assert report.skipped == {"lm_head": "output head"}
    with pytest.raises(UnsupportedError, match="NovelForCausalLM"):
        rarefy.load(tmp_path / "small")
    path.write_text(json.dumps(config))
    compress(dense, tmp_path / "known")
    assert same_bytes(tensors(tmp_path / "small"), tensors(tmp_path / "known"))
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(model, "llama"), logits(rarefy.load(tmp_path / "known"), "llama"))


def test_names_of_any_kind_are_streamed(tmp_path: Path) -> None:
    """Names that modules of torch use themselves must not confuse the choice by shapes."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"architectures": ["OddModel"], "model_type": "odd"}))
    matrix = torch.randn(8, 16)
    stored = {f"{name}.weight": matrix.clone() for name in ("forward", "type.half", "a.to", "norm", "embed", "lm_head")}
    stored |= {"weight": matrix.clone(), "a.scale": torch.ones(3), "conv.weight": torch.ones(2, 2, 2)}
    save_file(stored, tmp_path / "odd" / "model.safetensors")
    report = compress(tmp_path / "odd", tmp_path / "small")
    assert sorted(layer.name for layer in report.layers) == ["a.to", "forward", "type.half"]
    kept = tensors(tmp_path / "small")
    assert same_bytes(
        {name: kept[name] for name in ("weight", "a.scale", "conv.weight", "norm.weight")},
        {name: stored[name] for name in ("weight", "a.scale", "conv.weight", "norm.weight")},
    )


def test_other_weights_beside_the_model_s_are_left_out(dense: Path, tmp_path: Path) -> None:
    compress(dense, tmp_path / "one")
    shutil.copy(dense / "model.safetensors", dense / "model.fp16.safetensors")
    shutil.copy(dense / "model.safetensors", dense / "model-00001-of-00002.safetensors")
    shutil.copy(dense / "model.safetensors", dense / "consolidated.safetensors")
    assert [path.name for path in weight_files(dense)] == ["model.safetensors"]
    compress(dense, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        "{",
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": "b"}}',
    ],
)
def test_damaged_indices_of_a_source(index: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SourceError):
        weight_files(folder)


# Bytes


@pytest.mark.compat
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "qwen3_moe", "bert_lm", "t5", "vit"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_bytes_add_up(family: str, shard: str, tmp_path: Path) -> None:
    """Stored bytes are those of the report, of the ByteCount and of the files without their headers."""
    dense_folder(family, tmp_path / "dense")
    report = compress(tmp_path / "dense", tmp_path / "small", max_shard_size=shard)
    paths = sorted((tmp_path / "small").glob("*.safetensors"))
    in_files = sum(path.stat().st_size - read_header(path).data_start for path in paths)
    model = rarefy.load(tmp_path / "small")
    count, weights = weight_bytes(model)
    assert report.stored_bytes == in_files == count.total + exact_bytes(model).total
    assert weights == report.weights == sum(torch.Size(layer.shape).numel() for layer in report.layers)
    assert report.bits_per_weight["total"] == pytest.approx(count.total * 8 / weights, abs=1e-5)
    assert sum(value for name, value in report.bits_per_weight.items() if name != "total") == pytest.approx(
        report.bits_per_weight["total"], abs=1e-5
    )
    dense = sorted((tmp_path / "dense").glob("*.safetensors"))
    assert report.dense_bytes == sum(path.stat().st_size - read_header(path).data_start for path in dense)
    manifest = read_manifest(json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"])
    assert manifest.report is not None and manifest.report.stored_bytes == in_files
    if shard != "1GB":
        assert len(paths) > 1


def test_errors_are_those_of_the_stored_weights(dense: Path, tmp_path: Path) -> None:
    report = compress(dense, tmp_path / "small")
    original = load_file(dense / "model.safetensors")
    model = rarefy.load(tmp_path / "small")
    for layer in report.layers:
        weight = original[f"{layer.name}.weight"]
        error = (weight - model.get_submodule(layer.name).decode()).norm() / weight.norm()
        assert layer.relative_error == pytest.approx(float(error), rel=1e-4)
        assert layer.bits_per_weight == pytest.approx(
            model.get_submodule(layer.name).byte_count().total * 8 / weight.numel()
        )
        assert layer.seconds >= 0 and layer.method == "rtn"


# Interruptions


class Slow(WeightRecipe):
    """Round to nearest, slowly: registered under the same name by the process that gets killed."""

    def solve(self, layer: Layer) -> Solution:
        return Rtn(**INT4).solve(layer)


SLOW = """
import sys, time, torch
from pathlib import Path
import rarefy
from rarefy.contracts import Solution, WeightRecipe, weight_recipes
from rarefy.recipes.weights.rtn import Rtn
torch.set_num_threads(int(sys.argv[4]))
@weight_recipes.register("slow_for_tests")
class Slow(WeightRecipe):
    def solve(self, layer):
        time.sleep(0.4)
        return Rtn(num_bits=4, group_size=16).solve(layer)
rarefy.compress(sys.argv[1], "slow_for_tests", out=sys.argv[2], work_dir=sys.argv[3], device="cpu")
"""


@pytest.fixture
def slow() -> Any:
    weight_recipes.register("slow_for_tests")(Slow)
    yield
    del weight_recipes._entries["slow_for_tests"]


def environment() -> dict[str, str]:
    paths = [SOURCE, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.usefixtures("slow")
def test_a_killed_job_ends_in_the_same_bytes(dense: Path, tmp_path: Path) -> None:
    compress(dense, tmp_path / "whole", "slow_for_tests")
    out, work = tmp_path / "again" / "small", tmp_path / "work"
    command = [sys.executable, "-c", SLOW, str(dense), str(out), str(work), str(torch.get_num_threads())]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 240
        while len(list(work.glob("*.safetensors"))) < 4:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    finally:
        process.kill()
        process.communicate()
    assert not out.exists()
    solved = sorted(work.glob("*.safetensors"))
    assert 4 <= len(solved) < 14
    before = {path.name: path.read_bytes() for path in solved}
    compress(dense, out, "slow_for_tests", work_dir=work)
    assert files(out) == files(tmp_path / "whole")
    assert len(list(work.glob("*.safetensors"))) == 14
    assert all((work / name).read_bytes() == data for name, data in before.items())


@pytest.mark.parametrize("in_memory", [False, True])
def test_solved_layers_are_found_again(in_memory: bool, dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    work = tmp_path / "work"
    compress(dense, tmp_path / "one", work_dir=work)
    monkeypatch.setattr(Rtn, "solve", lambda *_: pytest.fail("solved again"))
    source = FAMILIES["llama"].build() if in_memory else dense
    compress(source, tmp_path / "two", work_dir=work)
    assert same_bytes(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    if not in_memory:
        assert files(tmp_path / "one") == files(tmp_path / "two")
    monkeypatch.undo()


def test_other_options_or_weights_are_solved_anew(dense: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    compress(dense, tmp_path / "one", work_dir=work)
    compress(dense, tmp_path / "two", work_dir=work, options={**INT4, "num_bits": 3})
    assert len(list(work.glob("*.safetensors"))) == 28
    compress(FAMILIES["llama"].build(seed=5), tmp_path / "three", work_dir=work)
    assert len(list(work.glob("*.safetensors"))) == 42
    compress(dense, tmp_path / "fresh", options={**INT4, "num_bits": 3})
    assert files(tmp_path / "two") == files(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["truncate", "flip", "text"])
def test_a_damaged_work_file_is_named(damage: str, dense: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    compress(dense, tmp_path / "one", work_dir=work)
    path = sorted(work.glob("*.safetensors"))[0]
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes({"truncate": bytes(raw[:-100]), "flip": bytes(raw), "text": b"hello, world"}[damage])
    with pytest.raises(OptionError, match=f"{path.name}.*damaged.*delete it"):
        compress(dense, tmp_path / "two", work_dir=work)
    assert not (tmp_path / "two").exists()
    path.unlink()
    compress(dense, tmp_path / "two", work_dir=work)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_one_process_to_a_work_folder(dense: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    code = "import sys, time; from pathlib import Path; from rarefy.calibration.solve import WorkFolder\n"
    code += "held = WorkFolder(Path(sys.argv[1])); print('held', flush=True); time.sleep(300)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(work)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(OptionError, match="in use by another process"):
            compress(dense, tmp_path / "small", work_dir=work)
        assert not (tmp_path / "small").exists()
    finally:
        process.kill()
        process.communicate()
    compress(dense, tmp_path / "small", work_dir=work)
    WorkFolder(work).close()


def test_a_work_folder_that_cannot_be(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for work in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OptionError, match="--work-dir"):
            compress(dense, tmp_path / "small", work_dir=work)


# The folder that comes out


def test_out_rules(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    compress(dense, out)  # an empty folder is fine
    before = files(out)
    with pytest.raises(OptionError, match=r"not empty.*--overwrite"):
        compress(dense, out, options={"num_bits": 3})
    assert files(out) == before
    (out / "stale.txt").touch()
    compress(dense, out, options={"num_bits": 3}, overwrite=True)
    assert "stale.txt" not in files(out) and files(out) != before
    with pytest.raises(OptionError, match="out=FOLDER"):
        rarefy.compress(dense, "rtn")
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="not a folder"):
        compress(dense, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "file", "small"]


def test_a_model_in_memory_is_not_touched_when_out_is_refused(dense: Path, tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(OptionError, match="not empty"):
        compress(model, dense)
    assert not list(compressed(model))


def test_what_travels_along(dense: Path, tmp_path: Path) -> None:
    texts = {
        "tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}", "vocab.txt": "a",
        "generation_config.json": '{"temperature": 0.5}', "LICENSE": "free", "preprocessor_config.json": "{}",
        "README.md": "---\nlicense: apache-2.0\n---\n# Dense", "additional_chat_templates/tools.jinja": "x",
        "tokenizer.py": "raise SystemExit", "modeling.py": "raise SystemExit", "training_args.bin": "x",
        "notes.txt": "no",
    }  # fmt: skip
    for name, text in texts.items():
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_text(text)
    compress(dense, tmp_path / "small")
    made = files(tmp_path / "small")
    expected = set(texts) - {"tokenizer.py", "modeling.py", "training_args.bin", "notes.txt"}
    assert set(made) == expected | {"config.json", "rarefy.safetensors"}
    assert all(made[name] == texts[name].encode() for name in expected - {"README.md"})
    card = made["README.md"].decode()
    assert "license: apache-2.0" in card and "LlamaForCausalLM.from_pretrained" in card and "base_model" not in card
    assert "bits each" in card and str(tmp_path) not in card
    config, source = json.loads(made["config.json"]), json.loads((dense / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "quantization_config"} == source
    assert str(tmp_path) not in json.dumps(config)


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ('license: "mit"\nbase_model: some/one', ["license: mit", "base_model: some/one"]),
        ("base_model: a/b/c\nlicense: [mit]", []),
        ("license: mit: no", []),
        ("- license", []),
    ],
    ids=["both", "of other kinds", "not YAML", "a list"],
)
def test_licence_and_base_model_travel_along(card: str, told: list[str], dense: Path, tmp_path: Path) -> None:
    (dense / "README.md").write_text(f"---\n{card}\n---\n# Dense")
    compress(dense, tmp_path / "small")
    rarefy.save(rarefy.load(tmp_path / "small"), tmp_path / "again")
    for name in ("small", "again"):
        lines = (tmp_path / name / "README.md").read_text().splitlines()
        assert lines[3 : lines.index("---", 1)] == told


def test_a_key_that_would_undo_the_guard_is_dropped(dense: Path, tmp_path: Path) -> None:
    path = dense / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_weights": "model.safetensors"}))
    compress(dense, tmp_path / "small")
    assert "transformers_weights" not in json.loads((tmp_path / "small" / "config.json").read_text())


# Refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(value: float, dense: Path, tmp_path: Path) -> None:
    def spoil(found: dict[str, Tensor]) -> None:
        found["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    rewrite(dense, spoil)
    with pytest.raises(RecipeError, match=r"'model\.layers\.1\.mlp\.up_proj'.*1 NaN or infinite"):
        compress(dense, tmp_path / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]
    recipe = Recipe(name="r", rules=(Rule(method="rtn", ignore=("model.layers.1.mlp.up_proj",), options=INT4),))
    model = transformers.LlamaForCausalLM.from_pretrained(dense)
    with pytest.raises(RecipeError, match="up_proj"):
        compress(model, None)
    assert not list(compressed(model))
    compress(dense, tmp_path / "small", recipe)
    compress(model, tmp_path / "memory", recipe)  # a failure before leaves no trace
    assert same_bytes(tensors(tmp_path / "small"), tensors(tmp_path / "memory"))
    assert len(list(compressed(rarefy.load(tmp_path / "memory")))) == 13


def test_a_weight_of_another_shape_than_the_config_says(dense: Path, tmp_path: Path) -> None:
    rewrite(dense, lambda found: found.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(80, 47)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' of 'dense' has shape \[80, 47\], expected \[80, 48\]"):
        compress(dense, tmp_path / "small")


class Hungry(WeightRecipe):
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def solve(self, layer: Layer) -> Solution:
        raise AssertionError("never called")


def test_recipes_that_need_data_are_refused_where_there_is_none() -> None:
    weight_recipes.register("hungry_for_tests")(Hungry)
    try:
        recipe = Recipe(name="hungry", rules=(Rule(method="hungry_for_tests"),))
        with pytest.raises(RecipeError, match=r"'hungry_for_tests' needs gram.*data-free recipe"):
            compress_model_(FAMILIES["llama"].build(), recipe)
    finally:
        del weight_recipes._entries["hungry_for_tests"]


def test_data_that_is_not_used_is_noted(dense: Path, tmp_path: Path) -> None:
    report = compress(dense, tmp_path / "small", data="demo")
    assert "recipe 'rtn' is data-free: calibration data 'demo' was not used" in report.notes
    assert "data-free" in (tmp_path / "small" / "README.md").read_text()


def test_compressed_models_are_not_compressed_again(dense: Path, tmp_path: Path) -> None:
    compress(dense, tmp_path / "small")
    for source in (tmp_path / "small", rarefy.load(tmp_path / "small")):
        with pytest.raises(UnsupportedError, match="dense model"):
            compress(source, tmp_path / "smaller")


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"architectures": "Llama"}])
def test_configs_that_describe_no_model(change: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    path = dense / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((SourceError, UnsupportedError, CheckpointError)):
        compress(dense, tmp_path / "small")
        rarefy.load(tmp_path / "small")
