"""``rarefy recipes``: what can be done to a model."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from rarefy.cli.common import Json, command, print_json, print_table


@command
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe's options.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or show one with its options and defaults."""
    from rarefy.contracts import weight_recipes
    from rarefy.recipes import discover, presets

    discover()
    if name is None:
        table = {label: _title(weight_recipes.get(label)) for label in weight_recipes}
        table.update({label: f"preset ({path.name})" for label, path in presets().items()})
        if as_json:
            print_json(table)
        else:
            print_table(("recipe", "what it does"), table.items())
        return
    recipe = weight_recipes.get(name)
    options = {
        label: {"type": _type_name(field.annotation), "default": field.default}
        for label, field in recipe.model_fields.items()
    }
    if as_json:
        print_json({"name": name, "about": inspect.getdoc(recipe), "needs": sorted(recipe.needs), "options": options})
        return
    print(inspect.getdoc(inspect.getmodule(recipe)) or "")
    print(f"\n{inspect.getdoc(recipe) or ''}\n")
    print_table(
        ("option", "type", "default"), ((key, entry["type"], str(entry["default"])) for key, entry in options.items())
    )
    needs = ", ".join(sorted(recipe.needs)) or "nothing: it is data-free"
    print(f"needs {needs}")


def _title(recipe: type[Any]) -> str:
    about = inspect.getdoc(inspect.getmodule(recipe)) or inspect.getdoc(recipe) or ""
    return about.splitlines()[0] if about else ""


def _type_name(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "").replace("Literal", "one of ")
