"""``rarefy recipes``: what can be done to a model."""

from __future__ import annotations

import inspect
import json
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from rarefy.cli.common import Json, command, print_json, print_table

# Where a sentence begins with the name of an option.
FIRST_OPTION = re.compile(r"(?:^|\.\s+)(?=``\w+``)")


@command
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe's options.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or show one with its options and defaults."""
    from rarefy.contracts import attention_recipes, kv_recipes, weight_recipes
    from rarefy.recipes import discover, load_recipe, presets

    discover()
    if name is None:
        table = {label: _title(weight_recipes.get(label)) for label in weight_recipes}
        table.update({label: f"KV cache: {_title(kv_recipes.get(label))}" for label in kv_recipes})
        table.update({label: f"attention: {_title(attention_recipes.get(label))}" for label in attention_recipes})
        table.update({label: f"preset: {_first_comment(path)}" for label, path in presets().items()})
        if as_json:
            print_json(table)
        else:
            print_table(("recipe", "what it does"), table.items(), text=True)
        return
    registry: Any = next((each for each in (weight_recipes, kv_recipes, attention_recipes) if name in each), None)
    if registry is None:
        preset = load_recipe(name)  # suggests the nearest name when there is none
        path = presets().get(name, Path(name))
        if as_json:
            print_json({"preset": preset.model_dump(mode="json")})
        else:
            print(path.read_text("utf-8").rstrip() if path.suffix != ".py" else preset.model_dump_json(indent=2))
        return
    recipe: type[Any] = registry.get(name)
    options = {
        label: {
            "type": _type_name(field.annotation),
            "default": "required" if field.is_required() else field.get_default(call_default_factory=True),
        }
        for label, field in recipe.model_fields.items()
    }
    needs = sorted(recipe.model_construct().needs)
    about = explanations(recipe)
    if as_json:
        print_json({"name": name, "about": "\n\n".join(about), "needs": needs, "options": options})
        return
    print("\n\n".join([inspect.getdoc(inspect.getmodule(recipe)) or "", *about]) + "\n")
    print_table(
        ("option", "default", "type"),
        ((label, _as_yaml(entry["default"]), entry["type"]) for label, entry in options.items()),
        text=True,
    )
    print(f"needs {', '.join(needs) or 'nothing: it is data-free'}")


def explanations(recipe: type[Any]) -> list[str]:
    """What is written about the options of a recipe: by itself, then by each class that it has some of them from."""
    found = []
    for cls in recipe.__mro__:
        options = set(getattr(cls, "model_fields", ()))
        inherited = {name for base in cls.__bases__ for name in getattr(base, "model_fields", ())}
        about = inspect.cleandoc(cls.__doc__ or "")
        if cls is recipe:
            found.append(about)
        elif options - inherited:
            # What such a class is for is not for who looks for options.
            begin = FIRST_OPTION.search(about)
            found.append(about if begin is None else about[begin.end() :])
    return found


def _title(recipe: type[Any]) -> str:
    about = inspect.getdoc(inspect.getmodule(recipe)) or inspect.getdoc(recipe) or ""
    return about.splitlines()[0] if about else ""


def _first_comment(path: Path) -> str:
    first = path.read_text("utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else path.name


def _type_name(annotation: Any) -> str:
    """A type as somebody types its values: ``int | null``, ``none | mse``, ``[int, ...]``."""
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type_name, get_args(annotation)))
    if origin is tuple:
        return f"[{', '.join('...' if part is Ellipsis else _type_name(part) for part in get_args(annotation))}]"
    if annotation is type(None):
        return "null"
    return annotation.__name__ if isinstance(annotation, type) and origin is None else str(annotation)


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
