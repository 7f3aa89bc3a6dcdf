"""Quiet libraries, and small models that several tests share."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rarefy
from tests.processes import environment
from tests.zoo import dense_folder

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

EIGHT_BITS = {"num_bits": 8, "group_size": 32}
Compressed = Callable[..., Path]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """``folders(family, **options)``: a compressed folder, its dense source beside it as ``dense``; made once."""
    made: dict[Any, Path] = {}

    def compressed(family: str, shard: str = "1GB", recipe: str = "rtn", **options: Any) -> Path:
        options = options or EIGHT_BITS
        key = (family, shard, recipe, tuple(sorted(options.items())))
        if key not in made:
            place = tmp_path_factory.mktemp(family)
            with torch.random.fork_rng(devices=[]):
                dense_folder(family, place / "dense")
                rarefy.compress(
                    place / "dense", recipe, options=options, out=place / "small", device="cpu", max_shard_size=shard
                )
            made[key] = place / "small"
        return made[key]

    return compressed


def python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh Python."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(), check=False)
