"""Running a program that a model wrote where it can do no harm: bubblewrap, limits, and a few seconds."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys

from rarefy.core.errors import UnsupportedError

SECONDS = 10
MEMORY_BYTES = 1 << 30
# The whole system read-only, an empty folder in memory, and no network, no processes and no environment of ours.
BOX = ("--ro-bind", "/", "/", "--dev", "/dev", "--tmpfs", "/dev/shm", "--chdir", "/dev/shm", "--unshare-all",
       "--die-with-parent", "--new-session", "--clearenv")  # fmt: skip
# Set inside the new process, before the program, so that what it starts has them too.
LIMITS = f"""
import resource
for kind, most in ((resource.RLIMIT_CPU, {SECONDS}), (resource.RLIMIT_AS, {MEMORY_BYTES}),
                   (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(kind, (most, most))
"""


def passes(program: str) -> bool:
    """Whether ``program`` (Python) ends without an exception within 10 seconds and 1 GiB.

    It sees the file system but cannot change it, and has no network, input, output or environment. Raises
    UnsupportedError where bubblewrap is absent or may not be used.
    """
    command = [sandbox(), *BOX, sys.executable, "-I", "-S", "-c", LIMITS + program]
    silent = subprocess.DEVNULL
    try:
        done = subprocess.run(
            command, stdin=silent, stdout=silent, stderr=silent, timeout=SECONDS * 1.5, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


@functools.cache
def sandbox() -> str:
    """The path of a bubblewrap that works. Raises UnsupportedError."""
    tool = shutil.which("bwrap")
    if tool is None or subprocess.run([tool, *BOX, "true"], capture_output=True, check=False).returncode != 0:
        raise UnsupportedError(
            "Running what a model wrote needs bubblewrap ('bwrap', on Linux) with user namespaces, which is absent or "
            "refused here; install it, or leave out the tasks that run code."
        )
    return tool
