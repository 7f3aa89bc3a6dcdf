"""What is made once and kept: folders from a source, built whole or not at all by one process at a time, and small
files that whoever comes first makes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from rarefy.core.errors import SourceError
from rarefy.core.files import staged_folder, write_bytes
from rarefy.core.logs import logger
from rarefy.core.memory import free_disk_bytes, human

log = logger(__name__)

# Raise it when the content of built folders changes, so that older ones are not taken for new ones.
CACHE_VERSION = 1
MARKER = "rarefy-source.json"


def cache_root() -> Path:
    """``$RAREFY_CACHE``, else ``rarefy`` under ``$XDG_CACHE_HOME``, else ``~/.cache/rarefy``."""
    if named := os.environ.get("RAREFY_CACHE"):
        return Path(named).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG rules say that a relative path is to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "rarefy"


def cached_bytes(path: Path, make: Callable[[], bytes]) -> bytes:
    """What ``make`` returns, kept as ``path`` for other processes, whose name has to tell all that it depends on. Where
    that cannot be read or written it is made each time."""
    with suppress(OSError):
        return path.read_bytes()
    made = make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, made)
    return made


def cached_folder(
    name: str, identity: Mapping[str, str | int | float], needed_bytes: int, build: Callable[[Path], None]
) -> Path:
    """The folder that ``build`` fills for ``identity``, built now unless the cache holds it already.

    ``name`` starts the folder's name; ``identity`` is all that the content depends on; ``needed_bytes`` is checked
    against the free disk space before building. A folder with missing or shortened files is built again. A second
    process that wants the same folder waits for the first.
    """
    key = json.dumps({"cache_version": CACHE_VERSION, **identity}, sort_keys=True)
    plain_name = re.sub(r"[^\w.-]+", "_", name)[:80]
    folder = cache_root() / "models" / f"{plain_name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if _is_whole(folder):
        return folder
    advice = f"set RAREFY_CACHE to a folder with {human(needed_bytes)} free"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_builder(folder):
            if not _is_whole(folder):
                _build(folder, identity, needed_bytes, build, advice)
    except OSError as failure:
        reason = failure.strerror or failure
        raise SourceError(f"The cache folder '{folder.parent}' cannot be used ({reason}); {advice}.") from failure
    except NotImplementedError:  # some network file systems
        raise SourceError(f"The cache folder '{folder.parent}' does not support file locks; {advice}.") from None
    return folder


def _build(
    folder: Path,
    identity: Mapping[str, str | int | float],
    needed_bytes: int,
    build: Callable[[Path], None],
    advice: str,
) -> None:
    if folder.exists():
        log.warning("The cached folder '%s' is damaged and is built again.", folder)
    for left_over in folder.parent.glob(f".{folder.name}.*"):  # of a killed process: we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    free = free_disk_bytes(folder)
    if free < needed_bytes:
        raise SourceError(
            f"The cache folder '{folder.parent}' has {human(free)} free where {human(needed_bytes)} are needed; "
            f"{advice}."
        )
    with staged_folder(folder, overwrite=True) as stage:
        build(stage)
        sizes = {path.name: path.stat().st_size for path in sorted(stage.iterdir())}
        (stage / MARKER).write_text(json.dumps({"source": dict(identity), "files": sizes}, indent=2) + "\n", "utf-8")


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / MARKER).read_text("utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _one_builder(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("Waiting for another process that is building '%s'.", folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
