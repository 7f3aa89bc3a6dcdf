from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rarefy.core.errors import SourceError
from rarefy.sources.cache import cache_root, cached_bytes, cached_folder

IDENTITY = {"kind": "test", "value": 1}


def fill(stage: Path) -> None:
    (stage / "a.txt").write_text("whole", "utf-8")


def test_the_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    monkeypatch.delenv("RAREFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "rarefy"
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_root() == Path.home() / ".cache" / "rarefy"


def test_what_is_built_is_kept(cache: Path) -> None:
    built = []

    def build(stage: Path) -> None:
        built.append(stage)
        fill(stage)

    first = cached_folder("thing", IDENTITY, 1, build)
    assert cached_folder("thing", IDENTITY, 1, build) == first
    assert cached_folder("thing", IDENTITY | {"value": 2}, 1, build) != first
    assert len(built) == 2
    (first / "a.txt").write_text("cut", "utf-8")
    assert (cached_folder("thing", IDENTITY, 1, build) / "a.txt").read_text("utf-8") == "whole"
    (first / "a.txt").unlink()
    assert (cached_folder("thing", IDENTITY, 1, build) / "a.txt").read_text("utf-8") == "whole"


def test_a_failed_build_leaves_nothing(cache: Path) -> None:
    def build(stage: Path) -> None:
        fill(stage)
        raise SourceError("broken")

    with pytest.raises(SourceError, match="broken"):
        cached_folder("thing", IDENTITY, 1, build)
    assert [path for path in cache.glob("models/*") if path.is_dir()] == []


def test_what_a_killed_process_left_is_swept(cache: Path) -> None:
    folder = cached_folder("thing", IDENTITY, 1, fill)
    left_over = folder.parent / f".{folder.name}.abc123"
    left_over.mkdir()
    (folder / "a.txt").unlink()
    cached_folder("thing", IDENTITY, 1, fill)
    assert not left_over.exists()


def test_too_little_space_and_no_folder(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"are needed; set RAREFY_CACHE to a folder with 1000\.0 TB|RAREFY_CACHE"):
        cached_folder("thing", IDENTITY, 10**18, fill)
    (tmp_path / "file").write_text("", "utf-8")
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="cannot be used"):
        cached_folder("thing", IDENTITY, 1, fill)


def test_two_processes_build_once(cache: Path, tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from rarefy.sources.cache import cached_folder

def build(stage):
    with Path({str(tmp_path / "log")!r}).open("a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    (stage / "a.txt").write_text("whole")

folder = cached_folder("thing", {IDENTITY!r}, 1, build)
assert (folder / "a.txt").read_text() == "whole"
"""
    started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)]
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert (tmp_path / "log").read_text("utf-8") == "built\n"


def test_small_files_are_made_once_where_they_can_be_kept(cache: Path) -> None:
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"image"

    path = cache / "kernels" / "one.bin"
    assert cached_bytes(path, make) == cached_bytes(path, make) == path.read_bytes() == b"image"
    assert len(made) == 1
    in_the_way = cache / "file"
    in_the_way.write_text("")
    assert cached_bytes(in_the_way / "two.bin", make) == b"image"
    assert len(made) == 2
