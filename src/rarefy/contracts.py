"""What the driver calls and what a recipe file fulfils: recipes, rules, and which layers they mean."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.estimators import Estimator, Even
from rarefy.attention.gate import BlockGate, Truth
from rarefy.attention.plan import AttentionPlan, AttentionShape
from rarefy.attention.policy import Phase, Policy
from rarefy.attention.selectors import Selector
from rarefy.core.config import StrictModel, parse
from rarefy.core.errors import RecipeError
from rarefy.core.registry import Registry
from rarefy.formats.terms import Term
from rarefy.kv.plan import HeadShape, KvSamples, LayerCodecs
from rarefy.layers.manifest import Execution
from rarefy.layers.swap import Site
from rarefy.statistics import Statistics


@dataclass(frozen=True)
class Layer:
    """One weight as a recipe sees it: float32 ``[out, in]`` or ``[experts, out, in]``, with what calibration knows."""

    name: str
    weight: Tensor
    statistics: Statistics = field(default_factory=Statistics)


@dataclass(frozen=True)
class Solution:
    """What a recipe makes of one weight: terms of the weight's shape, and notes on every fallback it had to take."""

    terms: list[Term]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Schedule:
    """How the driver feeds a recipe. ``inputs``: statistics of inputs that ``compressed`` or ``dense`` blocks before
    produced; ``true_sequential``: within a block, layers see what the compressed ones before them produce."""

    inputs: Literal["compressed", "dense"] = "compressed"
    true_sequential: bool = False

    def __post_init__(self) -> None:
        if self.true_sequential and self.inputs == "dense":
            raise RecipeError("true_sequential shows layers what compressed ones produce; set inputs to 'compressed'.")


class WeightRecipe(StrictModel, ABC):
    """A method that turns weights into terms; its fields are the options a user can set.

    ``needs`` names the statistics it wants (fields of ``Statistics``); a recipe that needs none is data-free and can
    stream any checkpoint. ``recipe_version`` goes into the manifest and rises when the same options give other codes.
    A recipe overrides the narrowest of its methods that suffices: the wider ones default to it.
    """

    recipe_version: ClassVar[int] = 1

    @property
    def needs(self) -> frozenset[str]:
        """The statistics it wants with these options; where options do not matter, a class attribute says it."""
        return frozenset()

    @property
    def sample_layers(self) -> int:
        """How many layers ``prepare`` wants to see."""
        return 0

    def schedule(self) -> Schedule:
        """How the driver should feed it."""
        return Schedule()

    def prepare(self, samples: Sequence[Layer]) -> WeightRecipe:
        """The recipe with all options decided; ``samples`` are ``sample_layers`` layers spread over the dense model."""
        return self

    def input_scale(self, layers: Sequence[Layer]) -> Tensor | None:
        """A factor per input column, float32 ``[in]``, by which the weights of ``layers`` (all that read one input) are
        multiplied and the input divided before any of their block is solved; the function stays the same."""
        return None

    def solve_group(self, layers: Sequence[Layer]) -> list[Solution]:
        """Solutions of ``layers`` that read one input, in their order."""
        return [self.solve(layer) for layer in layers]

    @abstractmethod
    def solve(self, layer: Layer) -> Solution:
        """Terms whose sum stands for the layer's weight."""


weight_recipes: Registry[WeightRecipe] = Registry("recipe", RecipeError)


class KvRecipe(StrictModel, ABC):
    """A method that stores a KV cache in code; its fields are the options a user can set.

    ``sink``: that many first tokens of each sequence stay in 16 bits; ``skip_layers``: so do all tokens of these layers
    (negative ones count from the last). ``needs`` names what `fit` wants of calibration data: ``samples`` of keys and
    values, and ``fisher``, the squared gradients of the loss by them; a recipe that needs nothing has no parameters.
    """

    recipe_version: ClassVar[int] = 1

    sink: int = Field(0, ge=0)
    skip_layers: tuple[int, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """What `fit` wants with these options."""
        return frozenset()

    @property
    def pre_rope(self) -> bool:
        """Whether keys are stored as they were before rotary position embedding."""
        return False

    def fit(self, samples: KvSamples) -> dict[str, Tensor]:
        """The parameters of one layer, by name."""
        return {}

    def settle(self, params: Mapping[int, Mapping[str, Tensor]]) -> Mapping[int, Mapping[str, Tensor]]:
        """What is kept of the parameters that `fit` found for each layer, where layers have something to share out."""
        return params

    @abstractmethod
    def codecs(self, shape: HeadShape, params: Mapping[str, Tensor]) -> LayerCodecs:
        """How a layer of this shape is stored with the parameters that `fit` found for it."""


kv_recipes: Registry[KvRecipe] = Registry("KV cache recipe", RecipeError)


class AttentionRecipe(Policy, ABC):
    """A method that decides which blocks of keys a query reads; its fields, those of `Policy` among them, are the
    options a user can set.

    ``block_q``, ``block_k``: tokens of a block of queries and of keys. ``heads``: whether prefill has lists for each
    ``query`` head, or shares them within each ``kv`` head as decoding always does. ``executor``: who computes attention
    over the lists; ``auto`` takes the fastest that can. A recipe whose ``needs`` are not empty has parameters, which
    training or calibration finds, by layer.
    """

    recipe_version: ClassVar[int] = 1

    block_q: int = Field(64, ge=1)
    block_k: int = Field(64, ge=1)
    heads: Literal["query", "kv"] = "query"
    executor: str = "auto"

    @property
    def needs(self) -> frozenset[str]:
        """What fitting its parameters takes: ``training`` or ``samples``; nothing for a recipe without any."""
        return frozenset()

    def estimator(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Estimator:
        """What scores blocks in a layer of this shape, with the parameters that were found for it."""
        return Even()

    @abstractmethod
    def selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Selector:
        """What chooses among scored blocks."""

    def decode_selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Selector | None:
        """What chooses while decoding; None: what chooses in prefill."""
        return None

    def measure(self, shape: AttentionShape, call: Call) -> dict[str, Tensor]:
        """What calibration learns of a layer from one dense pass; added up over passes and given to `fit`."""
        return {}

    def fit(self, shape: AttentionShape, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of a layer, by name, of a recipe whose ``needs`` are ``samples``."""
        return {}

    def plan(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> AttentionPlan:
        """How a layer of this shape attends."""
        return AttentionPlan(
            self.estimator(shape, params), self.selector(shape, params), self, self.block_q, self.block_k, self.heads,
            self.executor, shape.layers, self.decode_selector(shape, params),
        )  # fmt: skip


class GatedRecipe(AttentionRecipe, ABC):
    """An attention recipe whose parameters are gates that training teaches, by phase. ``truth``: what they learn of a
    block: its largest probability (``max``), the sum of all (``mass``), or the mean of both shares (``both``)."""

    truth: Truth = "both"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"training"})

    @abstractmethod
    def new_gates(self, shape: AttentionShape) -> dict[Phase, BlockGate]:
        """Untrained gates of a layer."""


attention_recipes: Registry[AttentionRecipe] = Registry("attention recipe", RecipeError)


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
