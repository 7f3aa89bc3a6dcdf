"""A path as people type it."""

from __future__ import annotations

import os
from pathlib import Path


def typed_path(source: str | Path) -> Path:
    """``source`` as a path, with ``~`` expanded where that names a home."""
    path = Path(os.fspath(source))
    try:
        return path.expanduser()
    except RuntimeError:  # no such user, or no home
        return path
