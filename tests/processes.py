"""Processes of their own for tests: another Python, one that dies, or several that make up one job."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import rarefy
import rarefy.api  # forked processes then need not import it

ROOT = Path(__file__).parents[1]


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
    context.set_forkserver_preload(["tests.processes"])
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
    context.set_forkserver_preload(["tests.processes"])
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
