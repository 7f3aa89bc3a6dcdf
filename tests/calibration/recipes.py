"""Small recipes that need data: they note what the driver shows them, and round to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rarefy.contracts import Layer, Schedule, Solution, WeightRecipe, weight_recipes
from rarefy.formats.grids import IntegerGrid
from rarefy.formats.terms import Dense, Term
from rarefy.solvers.rtn import round_to_nearest

SEEN: dict[str, Layer] = {}  # by name, of the last job; a test clears it
SAMPLED: list[Layer] = []
FACTORS: dict[str, Tensor] = {}  # by name of the layer


class Observing(WeightRecipe):
    """Rounds to nearest, whatever the statistics say, so that another implementation gets the same weights."""

    inputs: Literal["compressed", "dense"] = "compressed"
    true_sequential: bool = False
    num_bits: int = 3

    def schedule(self) -> Schedule:
        return Schedule(inputs=self.inputs, true_sequential=self.true_sequential)

    def solve(self, layer: Layer) -> Solution:
        SEEN[layer.name] = layer
        return Solution([rounded(layer.weight, self.num_bits)])


def rounded(weight: Tensor, num_bits: int = 3) -> Term:
    return round_to_nearest(weight, IntegerGrid(num_bits=num_bits, group_size=16))


@weight_recipes.register("gram_for_tests")
class GramRecipe(Observing):
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})


@weight_recipes.register("columns_for_tests")
class ColumnsRecipe(Observing):
    needs: ClassVar[frozenset[str]] = frozenset({"columns"})


@weight_recipes.register("inputs_for_tests")
class InputsRecipe(Observing):
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "columns"})


@weight_recipes.register("fisher_for_tests")
class FisherRecipe(Observing):
    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})


@weight_recipes.register("everything_for_tests")
class EverythingRecipe(Observing):
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "columns", "fisher", "gradient"})


@weight_recipes.register("importance_for_tests")
class ImportanceRecipe(Observing):
    """Rounds columns that matter more on a finer grid; its codes depend on the statistics."""

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def solve(self, layer: Layer) -> Solution:
        SEEN[layer.name] = layer
        assert layer.statistics.gram is not None
        importance = layer.statistics.gram.mean().diagonal(dim1=-2, dim2=-1).clamp(min=1e-12)
        search_free = IntegerGrid(num_bits=self.num_bits, group_size=16)
        if layer.weight.dim() == 3:
            return Solution([rounded(layer.weight, self.num_bits)])
        noise = torch.randn(layer.weight.shape, device=layer.weight.device) * 1e-3  # shows whether seeds are right
        scaled = layer.weight + noise * importance.rsqrt() * importance.mean().sqrt()
        return Solution([round_to_nearest(scaled, search_free)])


@weight_recipes.register("scaled_for_tests")
class ScaledRecipe(Observing):
    """Divides inputs by a power of their sizes, which it chooses on a few layers."""

    needs: ClassVar[frozenset[str]] = frozenset({"columns", "gram"})
    sample_layers: ClassVar[int] = 2
    power: float = 0.5

    def solve(self, layer: Layer) -> Solution:
        """The weight itself, so that a model's outputs tell whether the function stayed."""
        SEEN[layer.name] = layer
        return Solution([Dense.from_weight(layer.weight, "float32")])

    def prepare(self, samples: Sequence[Layer]) -> WeightRecipe:
        SAMPLED[:] = samples
        assert samples and all(layer.statistics.columns is not None for layer in samples)
        return self.model_copy(update={"power": 0.25})

    def input_scale(self, layers: Sequence[Layer]) -> Tensor | None:
        columns = layers[0].statistics.columns
        assert columns is not None
        if columns.members is not None:
            return None
        sizes = columns.norm().clamp(min=1e-4)
        factor = (sizes / sizes.mean()) ** self.power
        FACTORS.update((layer.name, factor) for layer in layers)
        return factor
