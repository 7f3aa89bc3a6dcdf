"""Where a dense model's tensors are read from, one at a time: a folder of files, or a model in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from rarefy.calibration.selection import tied_parameters
from rarefy.core.errors import SourceError
from rarefy.core.files import read_header
from rarefy.layers.checkpoint import digest_of


class Weights(Protocol):
    """Tensors by the names they have in the model."""

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype on its device. Raises SourceError when there is none of that name."""

    def __contains__(self, name: object) -> bool: ...

    def identity(self) -> str:
        """A hash that changes when the tensors do."""


class FolderWeights:
    """The tensors of safetensors files, memory-mapped; ``tied`` names are read under their owners' names."""

    def __init__(self, files: list[Path], tied: Mapping[str, str]):
        self._places = {name: path for path in files for name in read_header(path).tensors}
        self._tied = tied
        self._open: dict[Path, Any] = {}
        self._files = files

    def _stored(self, name: object) -> str | None:
        seen = set()
        while isinstance(name, str) and name not in seen:
            if name in self._places:
                return name
            seen.add(name)
            name = self._tied.get(name)
        return None

    def __contains__(self, name: object) -> bool:
        return self._stored(name) is not None

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        stored = self._stored(name)
        if stored is None:
            raise SourceError(f"The checkpoint has no tensor '{name}'; copy the whole model.")
        path = self._places[stored]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: Tensor = self._open[path].get_tensor(stored)
        return tensor

    def identity(self) -> str:
        digest = hashlib.sha256()
        for path in self._files:
            state = path.stat()
            with path.open("rb") as stream:
                head = stream.read(8 + int.from_bytes(stream.read(8), "little"))
            digest.update(json.dumps([path.name, state.st_size, state.st_mtime_ns]).encode() + head)
        return digest.hexdigest()


class ModelWeights:
    """The tensors of a loaded model."""

    def __init__(self, model: nn.Module):
        self._state = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
        for name, owner in tied_parameters(model).items():
            if owner in self._state:
                self._state.setdefault(name, self._state[owner])

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def read(self, name: str) -> Tensor:
        if name not in self._state:
            raise SourceError(f"The model has no tensor '{name}'; load it again from its folder.")
        return self._state[name]

    def identity(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self._state.items():
            digest.update(f"{name}{digest_of(tensor)}".encode())
        return digest.hexdigest()


class Overlay:
    """``Weights`` with some tensors replaced, such as a norm that took over an input scale."""

    def __init__(self, base: Weights):
        self.base = base
        self.changed: dict[str, Tensor] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.changed or name in self.base

    def read(self, name: str) -> Tensor:
        return self.changed[name] if name in self.changed else self.base.read(name)

    def identity(self) -> str:
        return self.base.identity()


def named_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, str, bool]]:
    """``(owner, label, full name, is a parameter)`` of every parameter and stored buffer below ``module``."""
    for path, owner in module.named_modules(prefix=prefix, remove_duplicate=False):
        lead = f"{path}." if path else ""
        for label, parameter in owner._parameters.items():
            if parameter is not None:
                yield owner, label, lead + label, True
        for label, buffer in owner._buffers.items():
            if buffer is not None and label not in owner._non_persistent_buffers_set:
                yield owner, label, lead + label, False
