"""A local model folder: taken as it is, once it is clear that Transformers can load it without running its code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rarefy.core.errors import SourceError, UnsupportedError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_folder(folder: Path, name: str) -> None:
    """Raise one sentence about model ``name`` unless ``folder`` has a readable config.json and whole safetensors.

    SourceError: no configuration, pickled weights, missing shards. UnsupportedError: a model that brings its own
    code (``auto_map``) and that Transformers does not know without it.
    """
    config = _read_config(folder, name)
    _refuse_remote_code(config, name)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise SourceError(
                f"'{name}' holds its weights as pickles only ('{pickles[0]}'), which can run code; convert it to "
                "safetensors first."
            )
        raise SourceError(
            f"'{name}' holds no .safetensors file, and weights in other forms are never loaded; use a release in "
            "safetensors, or convert it first."
        )
    quantization = config.get("quantization_config")
    ours = isinstance(quantization, dict) and quantization.get("quant_method") == "rarefy"
    if not ours:  # those are checked in full when they are loaded
        _check_shards(folder, name)


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise SourceError(f"'{name}' is an adapter, not a whole model; name its base model.")
        raise SourceError(f"'{name}' holds no config.json; name a Transformers model folder, a hub id or a .gguf file.")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise SourceError(f"The config.json of '{name}' is not a readable JSON object; copy it again.")
    return config


def _refuse_remote_code(config: dict[str, Any], name: str) -> None:
    if not config.get("auto_map"):
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"'{name}' has model type '{model_type}', which needs the code that comes with it (auto_map); such code is "
            "never run, so use a model that Transformers knows by itself."
        )


def _check_shards(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return
    try:
        shards = {str(shard) for shard in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceError(f"'{index.name}' of '{name}' is not a readable index; copy it again.") from None
    for shard in sorted(shards):
        if "/" in shard or "\\" in shard or shard.startswith("."):
            raise SourceError(f"'{index.name}' of '{name}' names '{shard}' outside its folder; do not trust this copy.")
        if not (folder / shard).is_file():
            raise SourceError(f"'{name}' lacks '{shard}', which its index names; finish the download or copy it again.")
