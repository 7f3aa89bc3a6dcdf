"""Builds the native library (csrc/) into the wheel, or beside the sources of an editable install.

Where it cannot be built - another system or processor, no compiler, a compiler that fails - the package is installed
without it and computes in torch; the build says so, and so does ``rarefy info``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "librarefy_cpu.so"
PLACE = Path("rarefy", "kernels", "cpu", LIBRARY)


def suits() -> bool:
    """Whether there are kernels for this machine."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64") and sys.maxsize > 2**32


def fingerprint(root: Path) -> str:
    """A hash of all that decides what the library is: its sources, this file, the compiler and its flags."""
    sources = [path for path in (root / "csrc").rglob("*") if path.is_file() and "tests" not in path.parts]
    digest = hashlib.sha256()
    for path in [root / "hatch_build.py", *sorted(sources)]:
        digest.update(f"{path.relative_to(root)} {path.stat().st_size} ".encode() + path.read_bytes())
    compiler = os.path.realpath(shutil.which(os.environ.get("CXX", "c++")) or "")
    stamp = os.stat(compiler).st_mtime_ns if compiler else 0
    digest.update(repr((compiler, stamp, os.environ.get("CXXFLAGS"), os.environ.get("LDFLAGS"))).encode())
    return digest.hexdigest()


class NativeLibrary(BuildHookInterface):  # type: ignore[type-arg]
    """CMake for whoever builds a wheel or installs from source."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        wanted = {"cmake": "cmake>=3.20", "ninja": "ninja>=1.10"} if suits() else {}
        return [package for command, package in wanted.items() if shutil.which(command) is None]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        root, target = Path(self.root), Path(self.root, "src", PLACE)
        made = target.with_suffix(".made")
        # A second environment of the same tree, or an install for a new requirement, need not compile again.
        wanted = fingerprint(root) if version == "editable" and suits() else ""
        if wanted and target.is_file() and made.is_file() and made.read_text() == wanted:
            return
        self.folder = tempfile.mkdtemp(prefix="rarefy-build-")
        reason = self._build(root, Path(self.folder)) if suits() else "there are no kernels for this processor yet"
        if reason is not None:
            self.app.display_warning(f"rarefy: no native library ({reason}); everything runs in torch")
            return
        built = Path(self.folder, LIBRARY)
        if version == "editable":
            part = target.with_suffix(".part")
            shutil.copy(built, part)
            os.replace(part, target)  # a process may have the old one open
            made.write_text(wanted)
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["force_include"][str(built)] = str(PLACE)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    def _build(self, root: Path, folder: Path) -> str | None:
        """Build the library in ``folder``; the reason why not, if it fails."""
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        for command in (
            ["cmake", "-S", str(root / "csrc"), "-B", str(folder), *generator],
            ["cmake", "--build", str(folder), "--parallel"],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as failure:
                return f"cmake cannot be run: {failure}"
            if done.returncode != 0:
                print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
                return f"'{' '.join(command[:2])}' failed; see above"
        return None if (folder / LIBRARY).is_file() else "the compiler made no library"
