"""Hub models, against a server of our own that answers as the hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rarefy.core.errors import SourceError
from rarefy.sources.models import open_model
from tests.sources.tiny_gguf import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {
    "org/missing": (404, "RepoNotFound"),
    "org/gated": (403, "GatedRepo"),
    "org/down": (500, ""),
    "org/disabled": (403, ""),
}


class Hub(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes] = {}

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        repo = next((repo for repo in (*REFUSALS, "org/good", "org/gatedfiles") if f"/{repo}/" in f"{path}/"), "")
        if repo in REFUSALS:
            status, code = REFUSALS[repo]
            disabled = {"X-Error-Message": "Access to this resource is disabled."} if repo == "org/disabled" else {}
            self.send(status, {"X-Error-Code": code, **disabled} if code or disabled else {}, b"{}", body)
        elif path.startswith("/api/") and "/revision/" in path and not path.endswith(("/main", COMMIT)):
            self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
        elif path.startswith("/api/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.send(200, {}, json.dumps(tree).encode(), body)
        elif path.startswith("/api/"):
            facts = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            self.send(200, {}, json.dumps(facts).encode(), body)
        elif repo == "org/gatedfiles":
            self.send(403, {"X-Error-Code": "GatedRepo"}, b"{}", body)
        else:
            data = self.files[path.rsplit("/", 1)[1]]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            self.send(200, headers, data, body)

    def send(self, status: int, headers: dict[str, str], data: bytes, body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("good")
    tiny_model("llama").save_pretrained(folder)
    Hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    Hub.files |= {"pytorch_model.bin": b"pickle", "modeling_evil.py": b"raise SystemExit", "README.md": b"# card"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(cache: Path, calls: list[tuple[str, str | None]], **environment: str) -> list[str]:
    """Open each model in one fresh process, since the hub's client reads its settings at import."""
    code = """
import json, sys
from rarefy.core.errors import RarefyError
from rarefy.sources.models import open_model
for source, revision in json.loads(sys.argv[1]):
    try:
        found = open_model(source, revision)
        print("FOUND", found.name, found.note, found.folder)
    except RarefyError as failure:
        print(type(failure).__name__, str(failure))
"""
    settings = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)], env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(calls), "each answer is one line"
    return lines


def test_every_refusal_is_one_sentence(hub: str, tmp_path: Path) -> None:
    calls = [
        ("org/missing", None), ("org/gated", None), ("org/gatedfiles", None), ("org/disabled", None),
        ("org/good", "no-such-branch"), ("org/down", None),
    ]
    missing, gated, files, disabled, revision, down = ask(tmp_path, calls, HF_ENDPOINT=hub)
    assert missing.startswith("SourceError 'org/missing' is neither a folder here nor a public model")
    assert gated.startswith("SourceError 'org/gated' is gated; accept its terms") and "hf auth login" in gated
    assert files.startswith("SourceError 'org/gatedfiles' is gated")
    assert disabled.startswith("SourceError 'org/disabled' has been disabled")
    assert revision.startswith("SourceError 'org/good' has no revision 'no-such-branch'")
    assert down.startswith("SourceError The hub answered 500")


def test_a_download_brings_no_code_and_no_pickles(hub: str, tmp_path: Path) -> None:
    (found,) = ask(tmp_path, [("org/good", None)], HF_ENDPOINT=hub)
    assert found.startswith("FOUND org/good dense reference = hub model org/good, commit 0123456789ab ")
    folder = Path(found.split(" ")[-1])
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= names
    assert not names & {"pytorch_model.bin", "modeling_evil.py"}
    # Without a network the cached copy serves, at a revision too; what is not cached is one sentence.
    again, pinned, other = ask(
        tmp_path, [("org/good", None), ("org/good", COMMIT), ("org/other", None)], HF_HUB_OFFLINE="1"
    )
    assert again.split(" ")[-1] == pinned.split(" ")[-1] == str(folder)
    assert pinned.startswith(f"FOUND org/good@{COMMIT} ")
    assert "offline mode is on" in other
    unreachable, cached = ask(tmp_path, [("org/other", None), ("org/good", None)], HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.startswith("SourceError The hub cannot be reached and 'org/other' is not in its cache")
    assert cached.split(" ")[-1] == str(folder)


def test_offline_mode_is_named() -> None:
    # What every test runs under: see conftest.py.
    with pytest.raises(SourceError, match="offline mode is on"):
        open_model("org/never-heard-of-it")


def test_an_impossible_id_is_named() -> None:
    with pytest.raises(SourceError, match="is not a hub id"):
        open_model("org/name--with..dots-")
