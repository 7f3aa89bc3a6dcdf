"""Keys and values as they are, in the store of all other recipes: the reference for its bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rarefy.contracts import KvRecipe, kv_recipes
from rarefy.kv.codecs import Exact
from rarefy.kv.plan import HeadShape, LayerCodecs


@kv_recipes.register("identity")
class Identity(KvRecipe):
    """Every number in the model's dtype."""

    def codecs(self, shape: HeadShape, params: Mapping[str, Tensor]) -> LayerCodecs:
        exact = Exact(shape.dtype)
        return LayerCodecs(exact, exact)
