"""One file per published method: its source, its equation, its defaults, and the shared blocks it names.

``load_recipe`` turns what a user names - a method, a preset or a YAML file - into one ``Recipe``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rarefy.contracts import Recipe, Rule, weight_recipes
from rarefy.core.config import parse
from rarefy.core.errors import RecipeError

ENTRY_POINTS = "rarefy.recipes"


def discover() -> None:
    """Import every recipe of this package, and those that installed packages announce as ``rarefy.recipes``."""
    for family in pkgutil.iter_modules(__path__, __name__ + "."):
        if not family.ispkg:
            continue
        package = importlib.import_module(family.name)
        for module in pkgutil.iter_modules(package.__path__, family.name + "."):
            importlib.import_module(module.name)
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()


def presets() -> dict[str, Path]:
    """Name -> file of the recipes that come ready as YAML."""
    folder = Path(__file__).parent / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path | Recipe, options: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that ``source`` names: a method id ('rtn'), a preset, a YAML file, or a Recipe.

    ``options`` (from ``--set key=value``) override those of every rule. Raises RecipeError when the source, a method, an
    option or a pattern is wrong.
    """
    discover()
    recipe = source if isinstance(source, Recipe) else _named(str(source))
    if options:
        rules = tuple(rule.model_copy(update={"options": {**rule.options, **options}}) for rule in recipe.rules)
        recipe = recipe.model_copy(update={"rules": rules})
    for rule in recipe.rules:
        rule.recipe()
    return recipe


def _named(source: str) -> Recipe:
    if source in weight_recipes:
        return Recipe(name=source, rules=(Rule(method=source),))
    path = presets().get(source, Path(source))
    if path.suffix not in (".yaml", ".yml"):
        known = weight_recipes.names() + list(presets())
        if path.suffix or "/" in source:
            raise RecipeError(f"Recipe file '{source}' is not a .yaml file; name a YAML file or one of: {', '.join(known)}.")
        weight_recipes.get(source)  # raises, suggesting the nearest name
    return _from_yaml(path)


def _from_yaml(path: Path) -> Recipe:
    import yaml

    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"Recipe file '{path}' does not exist; check the path.") from None
    except (OSError, UnicodeDecodeError) as failure:
        raise RecipeError(f"Recipe file '{path}' cannot be read ({failure}).") from None
    except yaml.YAMLError as failure:
        where = getattr(failure, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise RecipeError(f"Recipe file '{path}' is not valid YAML{line}; correct it.") from None
    if isinstance(data, dict):
        data.setdefault("name", path.stem)
    return parse(Recipe, data, f"Recipe file '{path}'", RecipeError)
