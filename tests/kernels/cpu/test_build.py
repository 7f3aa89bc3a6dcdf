"""The build hook: where the library cannot be built, the wheel is pure and the reason is told."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("hatchling", reason="building needs hatchling")
ROOT = Path(__file__).resolve().parents[3]


def hook() -> Any:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", ["no compiler", "no cmake", "another processor"])
def test_without_a_compiler_the_wheel_is_pure(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, told = hook(), []
    if case == "no compiler":
        monkeypatch.setenv("CXX", "/bin/false")
    elif case == "no cmake":
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    app = SimpleNamespace(display_warning=told.append)
    built = SimpleNamespace(force_include={})
    maker = module.NativeLibrary(str(ROOT), {}, None, None, "", "wheel", app)
    data: dict[str, Any] = {"force_include": built.force_include}
    maker.initialize("standard", data)
    maker.finalize("standard", data, "")
    assert data == {"force_include": {}} and not Path(maker.folder).exists()
    assert len(told) == 1 and "everything runs in torch" in told[0]


def test_what_is_built_already_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the sources of an editable install, until a source or the compiler changes."""
    module, built = hook(), []
    monkeypatch.setattr(module, "suits", lambda: True)

    def build(maker: Any, root: Path, folder: Path) -> None:
        built.append((folder / module.LIBRARY).write_bytes(b"library"))

    monkeypatch.setattr(module.NativeLibrary, "_build", build)
    library = tmp_path / "src" / module.PLACE
    library.parent.mkdir(parents=True)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "hatch_build.py").touch()
    source = tmp_path / "csrc" / "a.cpp"

    def install(text: str) -> int:
        source.write_text(text)
        maker = module.NativeLibrary(str(tmp_path), {}, None, None, "", "wheel", SimpleNamespace())
        maker.initialize("editable", {})
        maker.finalize("editable", {}, "")
        return len(built)

    assert [install("one"), install("one"), install("two")] == [1, 1, 2] and library.read_bytes() == b"library"
    library.unlink()
    assert install("two") == 3
    monkeypatch.setenv("CXXFLAGS", "-O0")
    assert install("two") == 4
