"""The native test program under AddressSanitizer and UndefinedBehaviorSanitizer, where there is a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="needs cmake and a C++ compiler",
)
def test_the_native_tests_pass_under_sanitizers(tmp_path: Path) -> None:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(tmp_path), "-DRAREFY_SANITIZE=ON", *generator]
    for command in (configure, ["cmake", "--build", str(tmp_path), "--parallel", "2"], [str(tmp_path / "native")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
