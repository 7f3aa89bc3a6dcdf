"""What the driver calls and what a recipe file fulfils: recipes, rules, and which layers they mean."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from rarefy.core.config import StrictModel, parse
from rarefy.core.errors import RecipeError
from rarefy.core.registry import Registry
from rarefy.formats.terms import Term
from rarefy.layers.manifest import Execution
from rarefy.layers.swap import Site


@dataclass(frozen=True)
class Solution:
    """What a recipe makes of one weight: terms of the weight's shape, and notes on every fallback it had to take."""

    terms: list[Term]
    notes: list[str] = field(default_factory=list)


class WeightRecipe(StrictModel, ABC):
    """A method that turns weights into terms; its fields are the options a user can set.

    ``needs`` names the statistics it wants; a recipe that needs none is data-free and can stream any checkpoint.
    ``recipe_version`` goes into the manifest and rises when the same options give other codes.
    """

    recipe_version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def solve(self, name: str, weight: Tensor) -> Solution:
        """Terms for ``weight``, float32 ``[out, in]`` or ``[experts, out, in]``; ``name`` is for messages."""


weight_recipes: Registry[WeightRecipe] = Registry("recipe", RecipeError)


class Rule(StrictModel):
    """Which layers get which method. Patterns are ``Linear`` (every linear layer), an exact name, or ``re:<regex>``
    matched from the start of the name; ``ignore`` wins over ``targets``."""

    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    method: str
    options: dict[str, Any] = Field(default_factory=dict)

    def recipe(self) -> WeightRecipe:
        """The method with its options. Raises RecipeError for unknown methods and options."""
        return parse(weight_recipes.get(self.method), self.options, f"Options of recipe '{self.method}'", RecipeError)

    def covers(self, site: Site) -> bool:
        """Whether the rule compresses this site."""
        return matches(self.targets, site.name) and not matches(self.ignore, site.name)


class Recipe(StrictModel):
    """Everything done to a model, as one YAML file or one object. The first rule that covers a layer applies."""

    name: str
    rules: tuple[Rule, ...] = Field(min_length=1)
    execution: Execution = Execution()

    def rule_of(self, site: Site) -> Rule | None:
        return next((rule for rule in self.rules if rule.covers(site)), None)


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether ``name`` is meant by one of ``patterns``. Raises RecipeError for a bad regular expression."""
    for pattern in patterns:
        if pattern == "Linear" or pattern == name:
            return True
        if pattern.startswith("re:"):
            try:
                if re.match(pattern[3:], name):
                    return True
            except re.error as failure:
                raise RecipeError(f"'{pattern}' is not a regular expression ({failure}); correct it.") from None
    return False
