"""The pages say what was measured: every generated table is that of the committed results and of the code."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from rarefy import api
from rarefy.cli import app
from rarefy.cli.common import parse_options
from rarefy.cli.evaluate import check_read
from rarefy.contracts import attention_recipes, kv_recipes
from rarefy.core.registry import Registry
from rarefy.integrations.transformers.kv_evaluation import parse_choice
from rarefy.recipes import discover, load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def test_tables_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def lines_of(start: str) -> list[tuple[str, str]]:
    """Lines of the pages' shell blocks that begin with ``start``, without comments, by page."""
    found = [(page.name, line) for page in PAGES for block in SHELL.findall(page.read_text("utf-8"))
             for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip
    return [(page, line.partition(" #")[0]) for page, line in found if line.startswith(start)]


@pytest.mark.parametrize(("page", "line"), lines_of("rarefy "))
def test_commands_on_the_pages_are_commands(page: str, line: str) -> None:
    name, *given = shlex.split(line.partition(" > ")[0].partition(" | ")[0])[1:]
    group = get_command(app)
    with typer.Context(group) as context:
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        assert command is not None, f"{page}: there is no command {name}"
        made = command.make_context(name, given, parent=context)  # raises for options and values that it does not take
        if name == "eval":
            check_read(made)


@pytest.mark.parametrize(("page", "line"), lines_of("python "))
def test_scripts_on_the_pages_are_there(page: str, line: str) -> None:
    assert (ROOT / line.split()[1]).is_file(), f"{page}: {line}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_every_page_is_in_the_table_of_pages(page: Path) -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    listed = {(ROOT / "docs" / target).resolve() for target in LINK.findall(index)}
    assert page.name == "README.md" or page.resolve() in listed, "list it in docs/README.md"


PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
VERBS: dict[str, tuple[Callable[..., Any], Registry[Any]]] = {
    "kv_cache": (api.kv_cache, kv_recipes), "set_attention": (api.set_attention, attention_recipes),
}  # fmt: skip


def calls() -> list[tuple[str, str, str, dict[str, Any]]]:
    """Page, verb, recipe and options of each ``rarefy.kv_cache`` and ``rarefy.set_attention`` in the pages' Python."""
    found = []
    for page in PAGES:
        for block in PYTHON.findall(page.read_text("utf-8")):
            for call in ast.walk(ast.parse(block)):
                match call:
                    case ast.Call(ast.Attribute(attr=("kv_cache" | "set_attention") as verb), [_, named], keywords):
                        given = {str(each.arg): ast.literal_eval(each.value) for each in keywords}
                        found.append((page.name, verb, ast.literal_eval(named), given))
    return [each for each in found if each[2] is not None]


@pytest.mark.parametrize(("page", "verb", "recipe", "given"), calls())
def test_options_in_python_are_those_of_the_recipe(page: str, verb: str, recipe: str, given: dict[str, Any]) -> None:
    discover()
    function, registry = VERBS[verb]
    own = inspect.signature(function).parameters
    registry.get(recipe).model_validate({name: value for name, value in given.items() if name not in own})


@pytest.mark.parametrize(("page", "line"), lines_of("rarefy eval "))
def test_options_of_eval_are_those_of_the_recipes(page: str, line: str) -> None:
    for flag, verb in (("--kv", "kv_cache"), ("--attention", "set_attention")):
        for use in re.findall(rf"{flag} (\S+)", line):
            recipe, given = parse_choice(flag, use)
            test_options_in_python_are_those_of_the_recipe(page, verb, recipe, given)


@pytest.mark.parametrize(("page", "line"), lines_of("rarefy compress "))
def test_options_of_compress_are_those_of_the_recipe(page: str, line: str) -> None:
    given = shlex.split(line.partition(" > ")[0])
    after = [given[index + 1] for index, word in enumerate(given) if word == "--set"]
    recipe = given[given.index("--recipe") + 1]
    load_recipe(ROOT / recipe if recipe.endswith(".py") else recipe, parse_options(after))
