"""Tensors that a job keeps for its next start: whole or absent, with a hash of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rarefy.core.devices import copy_to_cpu
from rarefy.core.errors import CheckpointError, FormatError, OptionError
from rarefy.core.files import read_header, write_tensors
from rarefy.layers.checkpoint import digests_of


def keep_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], lasting: bool = True) -> None:
    """Write ``tensors`` and, as JSON, ``about`` to a safetensors file, ``lasting`` as for `write_tensors`.

    Raises OSError.
    """
    keep_copies(path, copy_to_cpu(tensors), about, lasting)


def keep_copies(
    path: Path, copies: Callable[[], dict[str, Tensor]], about: Mapping[str, Any], lasting: bool = True
) -> None:
    """``keep_tensors`` of what ``copies`` brings to the CPU, on any thread."""
    here = copies()
    hashes = digests_of(here)
    write_tensors(path, here, {"about": json.dumps(about), "hashes": json.dumps(hashes)}, lasting)


class Kept:
    """A file of ``keep_tensors``; where it is damaged, everything raises OptionError, with its name and ``remedy``."""

    def __init__(self, path: Path, remedy: str = "delete the folder"):
        self.path, self._remedy = path, remedy
        try:
            header = read_header(path)
            self.about: dict[str, Any] = json.loads(header.metadata["about"])
            self._hashes: dict[str, str] = json.loads(header.metadata["hashes"])
        except (CheckpointError, KeyError, ValueError) as failure:
            raise self._damaged(failure) from None
        if self._hashes.keys() != header.tensors.keys():
            raise self._damaged("its names changed")

    def read(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Tensors whose names are ``wanted``, on the CPU."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in self._hashes if wanted(name)}
        except (SafetensorError, OSError, FormatError) as failure:
            raise self._damaged(failure) from None
        for name, digest in digests_of(found).items():
            if digest != self._hashes[name]:
                raise self._damaged(f"the bytes of '{name}' changed")
        return found

    def _damaged(self, reason: object) -> OptionError:
        return OptionError(f"'{self.path.name}' in --work-dir is damaged ({reason}); {self._remedy}.")
