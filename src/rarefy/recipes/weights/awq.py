"""AWQ (Lin et al. 2023): weights that meet large inputs are scaled up before rounding, and their inputs down.

``Q(W diag(s)) diag(s)^-1 x`` with ``s = mean|x| ** r`` per input channel, ``r`` searched for the least output error of
the layers that read the input (equation 5); ``1 / s`` goes into whatever produces the input, or is stored where
nothing can take it. Then each group's range is clipped where its own output error is least (queries and keys are not,
whose errors the softmax would magnify).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from rarefy.contracts import Layer, Schedule, Solution, matches, weight_recipes
from rarefy.recipes.grids import GridRecipe
from rarefy.solvers.awq import search_input_scale
from rarefy.solvers.clip import ClipSearch
from rarefy.solvers.rtn import round_to_nearest


@weight_recipes.register("awq")
class Awq(GridRecipe):
    """Activation-aware scaling, then rounding with a range searched for the least output error.

    ``clip``: ``output`` searches each group's range by its output error, ``none`` and ``mse`` as in rtn.
    ``clip_ignore``: layers (patterns) whose range is left alone. ``scale_steps``: exponents that are tried.
    ``inputs``: whether scales are chosen on what ``dense`` or ``compressed`` blocks before produce.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "columns"})

    clip: Literal["none", "mse", "output"] = "output"  # type: ignore[assignment]
    clip_ignore: tuple[str, ...] = (r"re:.*\b(q|k|query|key)(_proj)?$",)
    scale_steps: int = Field(20, ge=1)
    inputs: Literal["compressed", "dense"] = "compressed"

    def schedule(self) -> Schedule:
        return Schedule(inputs=self.inputs)

    def input_scale(self, layers: Sequence[Layer]) -> Tensor | None:
        gram, columns = layers[0].statistics.gram, layers[0].statistics.columns
        if gram is None or columns is None or gram.members is not None:
            return None
        weights = [layer.weight for layer in layers]
        factor, exponent = search_input_scale(
            weights, gram.mean(), columns.mean_absolute(), self.grid(), self.scale_steps
        )
        return factor if exponent else None

    def solve(self, layer: Layer) -> Solution:
        search, gram = self.search(), None
        if self.clip == "output" and layer.statistics.gram is not None and not matches(self.clip_ignore, layer.name):
            search, gram = ClipSearch(candidates=10, smallest=0.55), layer.statistics.gram.mean()
        return Solution([round_to_nearest(layer.weight, self.grid(), search=search, gram=gram)])
