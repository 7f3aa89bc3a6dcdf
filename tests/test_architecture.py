"""The rules of the house that a file can break without failing otherwise: gravity, size, and where names may live."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "rarefy"
MAX_LINES = 450

# Names of published methods, which belong in recipes/ alone. Words of the field that any layer may use
# (rtn, gptq, awq, wanda, sparsegpt, hadamard, nf4, fp4) are not among them.
PAPERS = frozenset(
    "abq abqllm afpq attnquant billm bitcpm bitdistiller cospadi dsformer eaquant frspec gear gpusq gqsa gwq infllm "
    "kivi kvquant million minference moequant paroattention ptq4vit quest repqvit seer seerattention sltrain sparge "
    "spatten specee spiel spqr squarehead squeezellm stbllm turboquant xattention".split()
)
ABOVE_OR_IN_RECIPES = ("cli", "api", "integrations", "recipes")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def below_recipes() -> list[Path]:
    rooms = (path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources())
    return [path for path, room in zip(sources(), rooms, strict=True) if room not in (*ABOVE_OR_IN_RECIPES, "__init__")]


def words(name: str) -> list[str]:
    """``name`` in lower case, cut at underscores and where its capitals start a word (``LLMGrid``: llm, grid)."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().strip("_").split("_")


def paper_in(name: str) -> str | None:
    """The paper that ``name`` mentions in one word or in two or three joined ones, as ``kv_quant`` mentions kvquant."""
    parts = words(name)
    runs = ("".join(parts[i : i + n]) for n in (1, 2, 3) for i in range(len(parts) - n + 1))
    return next((run for run in runs if run in PAPERS), None)


def defined_names(path: Path) -> Iterator[str]:
    yield path.stem
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name


def test_gravity() -> None:
    # In a process of its own: it switches off all loggers that there are.
    run = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_imports_the_front_door() -> None:
    """``import rarefy`` from inside would reach every verb from every layer, past the contract on layers."""
    importers = grimp.build_graph("rarefy", cache_dir=None).find_modules_that_directly_import("rarefy")
    inside = {name for name in importers if not name.startswith(("rarefy.cli", "rarefy.__main__"))}
    assert not inside, f"import from the module that defines it, not from 'rarefy': {sorted(inside)}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines and asks to be split"


@pytest.mark.parametrize("path", below_recipes(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_papers_are_named_in_recipes_only(path: Path) -> None:
    named = {name: paper for name in defined_names(path) if (paper := paper_in(name))}
    assert not named, f"{path.name} is below recipes/ and names papers: {named}"


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("kv_quant_codec", "kvquant"),
        ("SqueezeLLMGrid", "squeezellm"),
        ("KVQuantCodec", "kvquant"),
        ("SpQR", "spqr"),
        ("SeerGate", "seer"),
        ("request_blocks", None),
        ("gptq_columns", None),
        ("millions", None),
    ],
)
def test_a_paper_is_found_by_whole_words(name: str, paper: str | None) -> None:
    assert paper_in(name) == paper

