"""What this process has used, and what a job will need, in bytes."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path


def peak_bytes() -> int:
    """The largest resident size of this process since ``reset_peak``, in bytes; 0 where the system does not say."""
    try:
        # Unlike the figure below, this one does not start with what the parent process had.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Let ``peak_bytes`` count from now on, where the system can; elsewhere from the start of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def available_bytes() -> int | None:
    """Memory that a new allocation can get, in bytes, or None where the system does not say."""
    try:
        # Linux counts here what it can drop from its file cache, which holds any model just read.
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def free_disk_bytes(path: Path) -> int:
    """Free disk space, in bytes, at ``path`` or its nearest existing parent."""
    import shutil

    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def human(size: float) -> str:
    """``size`` bytes as text with a decimal unit (1 MB = 10**6 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
