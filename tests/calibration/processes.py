"""Jobs in processes of their own: some die, some are several."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rarefy
from rarefy.calibration import calibrated, driver, gradients, journal
from rarefy.contracts import Recipe, Rule
from rarefy.layers import checkpoint
from tests.calibration import recipes  # noqa: F401 - registers them
from tests.zoo import VOCABULARY

METHODS = ("importance_for_tests", "fisher_for_tests", "scaled_for_tests")
PLACES: dict[str, Any] = {
    "Journal": journal.Journal, "FileStream": driver.FileStream, "gradients": gradients,
    "ShardWriter": checkpoint.ShardWriter,
}  # fmt: skip


def tokens(seed: int = 2, rows: int = 5) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(seed))


def compress(source: Any, out: Path | None, work: Path | None = None, method: str = METHODS[0], **settings: Any) -> Any:
    recipe = Recipe(name=method, rules=(Rule(method=method, options=settings.pop("options", {})),))
    return rarefy.compress(source, recipe, out=out, work_dir=work, **({"device": "cpu", "data": tokens()} | settings))


def small_batches_(patch: pytest.MonkeyPatch) -> None:
    """Several batches from little data."""
    patch.setattr(driver, "BATCH_TOKENS", {"cpu": 16})
    patch.setattr(calibrated, "BATCH_TOKENS", {"cpu": 16})


def die(point: str, threads: int, arguments: tuple[Any, ...]) -> None:
    """Compress until a function is called for the n-th time, and be killed before or after it."""
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    small_batches_(pytest.MonkeyPatch())
    owner, name, count, moment = point.split(",")
    original, left = getattr(PLACES[owner], name), [int(count)]

    def dies(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(PLACES[owner], name, dies)
    compress(*arguments)
