"""Finished measurements of a long evaluation, so that a killed one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rarefy.core.errors import OptionError
from rarefy.core.files import write_text
from rarefy.core.version import __version__


class Journal:
    """One JSON file per measurement in ``folder``, named by a hash of everything that decides its outcome.

    Without a folder it forgets. Files are whole or absent, so several processes may share a folder.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def keeps(self) -> bool:
        return self._folder is not None

    def take(self, key: dict[str, Any]) -> Any:
        """The outcome that was kept under ``key``, or None. Raises OptionError when its file is damaged."""
        path, key = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            entry = json.loads(path.read_text("utf-8"))
            if entry["key"] == key:
                return entry["outcome"]
        except (ValueError, KeyError, TypeError):
            pass
        raise OptionError(f"'{path}' in --work-dir is damaged; delete it.")

    def keep(self, key: dict[str, Any], outcome: Any) -> None:
        """Make ``outcome``, a JSON value, durable under ``key``."""
        path, key = self._path(key)
        if path is not None:
            write_text(path, json.dumps({"key": key, "outcome": outcome}))

    def _path(self, key: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
        if self._folder is None:
            return None, key
        text = json.dumps({"rarefy": __version__, **key}, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json", json.loads(text)


def fingerprint(folder: Path) -> str:
    """What identifies the model in ``folder``: names, sizes and times of its files, hashed."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([str(folder.resolve()), facts]).encode()).hexdigest()[:32]
