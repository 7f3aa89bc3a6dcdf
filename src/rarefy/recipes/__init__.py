"""One file per published method: its source, its equation, its defaults, and the shared blocks it names.

``load_recipe`` turns what a user names - a method, a preset, a YAML file, or a Python file that registers a method -
into one ``Recipe``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rarefy.contracts import Recipe, Rule, attention_recipes, kv_recipes, matches, weight_recipes
from rarefy.core.config import parse
from rarefy.core.errors import RarefyError, RecipeError
from rarefy.core.logs import logger

log = logger(__name__)
ENTRY_POINTS = "rarefy.recipes"
# Recipes that are not given to ``compress``, and what they are given to.
OTHERS = (
    ("KV caches", kv_recipes, "rarefy.kv_cache(model, '{0}') or rarefy eval --kv {0}"),
    ("attention", attention_recipes, "rarefy.set_attention(model, '{0}') or rarefy eval --attention {0}"),
)


def discover() -> None:
    """Import every recipe of this package, and those that installed packages announce as ``rarefy.recipes``."""
    for family in pkgutil.iter_modules(__path__, __name__ + "."):
        if not family.ispkg:
            continue
        package = importlib.import_module(family.name)
        for module in pkgutil.iter_modules(package.__path__, family.name + "."):
            importlib.import_module(module.name)
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as failure:  # whatever a foreign module raises; the recipes of others must stay usable
            log.warning("Recipes of '%s' cannot be used (%s: %s).", entry.value, type(failure).__name__, failure)


def presets() -> dict[str, Path]:
    """Name -> file of the recipes that come ready as YAML."""
    folder = Path(__file__).parent / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path | Recipe, options: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that ``source`` names: a method id ('rtn'), a preset, a YAML or Python file, or a Recipe.

    ``options`` (from ``--set key=value``) override those of every rule. Raises RecipeError when the source, a method,
    an option or a pattern is wrong.
    """
    discover()
    recipe = source if isinstance(source, Recipe) else _named(str(source))
    if options:
        rules = tuple(rule.model_copy(update={"options": {**rule.options, **options}}) for rule in recipe.rules)
        recipe = recipe.model_copy(update={"rules": rules})
    for rule in recipe.rules:
        rule.recipe()
        for pattern in (*rule.targets, *rule.ignore):
            matches((pattern,), "")
    return recipe


def _named(source: str) -> Recipe:
    if source in weight_recipes:
        return Recipe(name=source, rules=(Rule(method=source),))
    path = presets().get(source, Path(source))
    if path.suffix == ".py":
        return _from_python(path)
    if path.suffix not in (".yaml", ".yml"):
        known = weight_recipes.names() + list(presets())
        if path.suffix or "/" in source:
            raise RecipeError(f"Recipe file '{source}' is neither .yaml nor .py; known recipes: {', '.join(known)}.")
        for kind, others, use in OTHERS:
            if source in others:
                raise RecipeError(f"Recipe '{source}' is of {kind}, not of weights; use it as {use.format(source)}.")
        near = difflib.get_close_matches(source, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}."
        raise RecipeError(f"Unknown recipe '{source}'; {hint}")
    return _from_yaml(path)


def _from_python(path: Path) -> Recipe:
    """Run a file of the user's own that registers one method, and use that method."""
    if not path.is_file():
        raise RecipeError(f"Recipe file '{path}' does not exist; check the path.")
    before = set(weight_recipes)
    label = f"{__name__}.outside.{path.stem}"
    spec = importlib.util.spec_from_file_location(label, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[label] = module  # where pydantic looks up the names in the types of its options
    try:
        spec.loader.exec_module(module)
    except RarefyError:
        raise
    except Exception as failure:  # the file may raise anything
        raise RecipeError(f"Recipe file '{path}' cannot be run ({type(failure).__name__}: {failure}).") from failure
    new = sorted(set(weight_recipes) - before)
    own = new or sorted(name for name in weight_recipes if weight_recipes.get(name).__module__ == label)
    if len(own) != 1:
        raise RecipeError(f"Recipe file '{path}' registers {len(own)} recipes; register exactly one.")
    return Recipe(name=own[0], rules=(Rule(method=own[0]),))


def _from_yaml(path: Path) -> Recipe:
    import yaml

    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"Recipe file '{path}' does not exist; check the path.") from None
    except (OSError, UnicodeDecodeError) as failure:
        raise RecipeError(f"Recipe file '{path}' cannot be read ({failure}).") from None
    except (yaml.YAMLError, ValueError, RecursionError) as failure:
        where = getattr(failure, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise RecipeError(f"Recipe file '{path}' is not valid YAML{line}; correct it.") from None
    if isinstance(data, dict):
        data.setdefault("name", path.stem)
    return parse(Recipe, data, f"Recipe file '{path}'", RecipeError)
