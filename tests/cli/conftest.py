"""A tiny model of each kind with its tokenizer on disk, a text in its alphabet, and the command line in-process."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

import rarefy
from tests.zoo import dense_folder, tiny_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
OPTIONS = {"num_bits": 4, "group_size": 16}
Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """``run("eval", folder, ...)``: exit code, stdout and stderr of a command; a traceback fails the test."""

    def call(*arguments: object, stdin: str | None = None) -> Result:
        from rarefy.cli import app

        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="rarefy")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def shell() -> Callable[..., Any]:
    """Where a process of its own is started: the environment and the start of its command line."""
    root = Path(__file__).parents[2]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]),
    }  # fmt: skip

    def give(*arguments: object) -> dict[str, Any]:
        return {"args": [sys.executable, "-m", "rarefy", *map(str, arguments)], "env": environment, "text": True}

    return give


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``llama`` (chat template), ``plain`` (none), ``tied``, ``bert``, ``small`` (compressed llama)."""
    root = tmp_path_factory.mktemp("models")
    families = {"llama": "llama", "plain": "llama", "tied": "llama_tied", "bert": "bert_lm", "t5": "t5", "gpt2": "gpt2"}
    with torch.random.fork_rng(devices=[]):
        for name, family in families.items():
            dense_folder(family, root / name)
            tokenizer = tiny_tokenizer()
            if name == "llama":
                tokenizer.chat_template = TEMPLATE
            tokenizer.save_pretrained(root / name)
        rarefy.compress(root / "llama", options=OPTIONS, out=root / "small", device="cpu")
    return root


@pytest.fixture
def llama(models: Path, tmp_path: Path) -> Path:
    """A copy of the dense model, for tests that would harm it."""
    return Path(shutil.copytree(models / "llama", tmp_path / "llama"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 words that the tiny tokenizer knows."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text(" ".join(draw.choice("abcdefghijklmnop") for _ in range(700)))
    return path


def one_json(result: Result) -> Any:
    """The one JSON value on stdout; anything beside it is an error."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def one_sentence(result: Result, code: int = 2) -> str:
    """What a refused command says: nothing on stdout, one line on stderr."""
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in lines[0]
    return lines[0].removeprefix("error: ")
