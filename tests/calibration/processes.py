"""Jobs in processes of their own: some die, some are several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
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
ROOT = Path(__file__).parents[2]
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


def environment() -> dict[str, str]:
    """Variables for another Python that must find this package and the tests."""
    paths = [str(Path(rarefy.__file__).parents[1]), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def fresh_process(function: Callable[..., None], *arguments: Any) -> int:
    """Exit code of a process that calls ``function``; minus the signal that ended it.

    Forked from one that has imported everything and run nothing, which is fast, and safe with threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.calibration.processes"])
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join(240)
    code = process.exitcode
    process.kill()
    assert code is not None
    return code


def side_by_side(size: int, function: Callable[..., None], *arguments: Any, seconds: float = 300) -> list[int | None]:
    """Exit codes of ``size`` processes that make up one job, as torchrun would start them; None for one that hung."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.calibration.processes"])
    processes = [context.Process(target=_rank, args=(rank, size, port, function, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _rank(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    function(rank, *arguments)


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
