from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rarefy.core.errors import UnsupportedError
from rarefy.evaluation.tasks import sandbox


@pytest.fixture
def box() -> None:
    try:
        sandbox.sandbox()
    except UnsupportedError as failure:
        pytest.skip(str(failure))


@pytest.mark.usefixtures("box")
def test_right_and_wrong_programs() -> None:
    assert sandbox.passes("import math\nassert math.sqrt(4) == 2")
    assert not sandbox.passes("assert 1 == 2")
    assert not sandbox.passes("this is not Python")
    assert not sandbox.passes("import sys\nsys.exit(3)")


@pytest.mark.usefixtures("box")
def test_programs_change_nothing_and_reach_nobody(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    sandbox.passes(f"import os\nos.unlink({str(mine)!r})")
    sandbox.passes(f"open({str(mine)!r}, 'w').write('yours')")
    assert not Path(mine).exists() or mine.read_text() == "mine"
    assert mine.exists()
    home = Path.home()
    assert not sandbox.passes(f"open({str(home / 'made-by-a-model')!r}, 'w')")
    assert not (home / "made-by-a-model").exists()
    assert not sandbox.passes("import socket\nsocket.create_connection(('127.0.0.1', 9), 2)")
    assert sandbox.passes("import os\nassert 'PATH' not in os.environ and os.listdir() == []")


@pytest.mark.usefixtures("box")
def test_programs_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sandbox.passes("x = bytearray(1 << 31)")
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    assert not sandbox.passes("while True: pass")


def test_without_a_sandbox_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    sandbox.sandbox.cache_clear()
    with pytest.raises(UnsupportedError, match="needs bubblewrap"):
        sandbox.passes("pass")
    sandbox.sandbox.cache_clear()
