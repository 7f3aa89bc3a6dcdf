"""What holds for every test: no network, one thread for each test process, random numbers and loggers as at first."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator

# Read by the libraries when they are imported, and inherited by the commands that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if PARALLEL:
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if PARALLEL:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads this when a kernel's module is imported; without a GPU its kernels can only be interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Time limits fail on a busy machine; fixed examples in CI keep a failure from coming and going.
hypothesis.settings.register_profile("rarefy", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("rarefy")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """The command line adds a handler on the stderr of its moment; each test has its own stderr."""
    root = logging.getLogger("rarefy")
    before, propagate, level = root.handlers[:], root.propagate, root.level
    root.handlers = []
    yield
    root.handlers, root.propagate = before, propagate
    root.setLevel(level)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator of its own, for tests that must not depend on how much others draw."""
    return torch.Generator().manual_seed(0)
