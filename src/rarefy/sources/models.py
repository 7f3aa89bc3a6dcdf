"""Any way to name a model, turned into a folder that Transformers loads."""

from __future__ import annotations

import os
from pathlib import Path

from rarefy.core.errors import OptionError, SourceError
from rarefy.sources.demo import is_demo, open_demo
from rarefy.sources.folder import check_folder
from rarefy.sources.gguf import open_gguf
from rarefy.sources.hub import HUB_ID, download
from rarefy.sources.model_source import ModelSource
from rarefy.sources.paths import typed_path

__all__ = ["ModelSource", "open_model"]


def open_model(source: str | Path, revision: str | None = None) -> ModelSource:
    """Find the model that ``source`` names and return it as a local folder.

    - ``demo`` or ``demo:jitter=0.1,seed=1``: the packaged SmolLM2-135M-Instruct, dense, jittered, cached;
    - a folder with config.json and safetensors: taken as it is;
    - a ``.gguf`` file, or a folder with exactly one and no safetensors: converted once, cached;
    - ``org/name``: downloaded from the hub at ``revision`` (branch, tag or commit). Only this uses the network.

    Raises SourceError, UnsupportedError (models that need their own code, unknown GGUF contents) or OptionError
    (``revision`` of something that has none, bad demo options), each one sentence.
    """
    text = os.fspath(source)
    if isinstance(source, str) and is_demo(source):
        _no_revision(source, revision)
        return open_demo(source)
    path = typed_path(source)
    if text and _exists(path):
        _no_revision(text, revision)
        return _open_path(path)
    if isinstance(source, str) and HUB_ID.fullmatch(source) and not source.endswith(".gguf"):
        folder = download(source, revision)
        check_folder(folder, source)
        name = source if revision is None else f"{source}@{revision}"
        return ModelSource(name, folder, f"dense reference = hub model {source}, commit {folder.name[:12]}")
    raise SourceError(
        f"There is no model '{text}': no such folder or file, and not a hub id of the form org/name; check the "
        "spelling, or use 'demo'."
    )


def _open_path(path: Path) -> ModelSource:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceError(f"'{path}' is not a .gguf file; name a model folder, a hub id or a .gguf file.")
        return open_gguf(path)
    name = path.resolve().name
    gguf = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if gguf and not any(path.glob("*.safetensors")):
        if len(gguf) > 1:
            raise SourceError(f"'{path}' holds {len(gguf)} .gguf files; name one of them, such as '{gguf[0]}'.")
        return open_gguf(gguf[0])
    check_folder(path, str(path))
    return ModelSource(name, path, f"dense reference = the model in folder '{name}'")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # names too long or with a null character
        return False


def _no_revision(source: str, revision: str | None) -> None:
    if revision is not None:
        raise OptionError(f"A revision can be chosen for hub models only, and '{source}' is not one; leave it out.")
