from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rarefy.core.errors import OptionError, RarefyError, SourceError, UnsupportedError
from rarefy.sources.models import open_model
from tests.sources.tiny_gguf import tiny_model, write_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "tiny", max_shard_size="100KB")
    return tmp_path / "tiny"


def test_a_folder_passes_through(folder: Path) -> None:
    source = open_model(str(folder))
    assert (source.name, source.folder) == ("tiny", folder)
    assert "\n" not in source.note


def test_a_name_with_a_home_sign_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert open_model("~/tiny").folder == folder


def test_pickled_weights_are_refused(folder: Path) -> None:
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pickles only \('pytorch_model\.bin'\)"):
        open_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(SourceError, match=r"no \.safetensors"):
        open_model(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(SourceError, match=r"lacks 'model-"):
        open_model(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a\\b.safetensors", ".hidden"])
def test_an_index_cannot_point_outside(shard: str, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}), "utf-8")
    with pytest.raises(SourceError, match="outside its folder"):
        open_model(folder)


@pytest.mark.parametrize("content", ["{", "[]", '"x"', ""])
def test_an_unreadable_configuration_is_refused(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content, "utf-8")
    with pytest.raises(SourceError, match=r"config\.json"):
        open_model(folder)


def test_an_unreadable_index_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}', "utf-8")
    with pytest.raises(SourceError, match="not a readable index"):
        open_model(folder)


def test_remote_code_is_refused_by_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["auto_map"] = {"AutoConfig": "configuration_evil.EvilConfig"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert open_model(folder).folder == folder, "Transformers knows Llama without the code that came along"
    config["model_type"] = "evil_net"
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UnsupportedError, match=r"'evil_net'.*auto_map"):
        open_model(folder)


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", "utf-8")
    with pytest.raises(SourceError, match="is an adapter"):
        open_model(tmp_path)


def test_a_folder_with_one_gguf_file(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.GGUF", tiny_model("qwen3"))
    assert open_model(tmp_path).folder == open_model(tmp_path / "tiny.GGUF").folder
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"holds 2 \.gguf files"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("source", "error", "part"),
    [
        ("", SourceError, "There is no model ''"),
        ("no-such-folder", SourceError, "no such folder or file"),
        ("./no/such/folder", SourceError, "no such folder or file"),
        ("org/name.gguf", SourceError, "no such folder or file"),
        ("a/b/c", SourceError, "no such folder or file"),
        ("x" * 5000, SourceError, "no such folder or file"),
        ("nul\0character", SourceError, "no such folder or file"),
        ("~no-such-user/model/x", SourceError, "no such folder or file"),
        ("demo:", OptionError, "bad option ''"),
        ("demo:sigma=1", OptionError, "bad option 'sigma=1': unknown"),
        ("demo:seed=-1", OptionError, "seed is a whole number"),
        ("demo:seed=1.5", OptionError, "seed is a whole number"),
        ("demo:seed=4294967296", OptionError, "seed is a whole number"),
        ("demo:seed=1,seed=2", OptionError, "gives 'seed' twice"),
        ("demo:jitter=nan", OptionError, "jitter is a number from 0 to 1"),
        ("demo:jitter=-0.1", OptionError, "jitter is a number from 0 to 1"),
        ("demo:jitter=2", OptionError, "jitter is a number from 0 to 1"),
        ("demo:jitter=0.1 ,seed", OptionError, "'seed'"),
    ],
)
def test_a_bad_name_is_one_sentence(source: str, error: type[RarefyError], part: str) -> None:
    with pytest.raises(error, match=part) as caught:
        open_model(source)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"not a \.gguf file"):
        open_model(tmp_path / "weights.bin")


def test_a_revision_belongs_to_the_hub(folder: Path) -> None:
    for source in (str(folder), "demo"):
        with pytest.raises(OptionError, match="hub models only"):
            open_model(source, revision="main")


def test_importing_the_sources_is_light() -> None:
    heavy = ("torch", "transformers", "numpy", "huggingface_hub", "safetensors", "gguf", "tokenizers")
    imports = "import sys, rarefy.sources.models, rarefy.sources.texts, rarefy.sources.windows"
    code = f"{imports}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
