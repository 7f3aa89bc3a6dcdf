"""MILLION (Wang et al. 2025): product quantization, which channels of any size cannot stretch.

A head's vector is cut into sub-vectors of ``width`` channels, each replaced by the nearest of ``2 ** code_bits``
centroids, found by k-means on calibration data, for keys and values of every layer apart: ``code_bits / width`` bits
per number and nothing else. A query meets keys through a table of its products with all centroids (section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from rarefy.contracts import KvRecipe, kv_recipes
from rarefy.core.errors import RecipeError
from rarefy.kv.codecs import ProductTable
from rarefy.kv.plan import HeadShape, KvSamples, LayerCodecs
from rarefy.solvers.kmeans import kmeans

POINTS_PER_CENTROID = 64


@kv_recipes.register("million")
class Million(KvRecipe):
    """Product quantization. ``width``: neighbouring channels that share a code of ``code_bits``; ``steps`` of the
    k-means that finds the codebooks. ``block``: tokens that are coded together, in 16 bits until there are as many.
    ``recent``: newest tokens that stay in 16 bits."""

    width: int = Field(2, ge=1)
    code_bits: int = Field(8, ge=1, le=8)
    block: int = Field(64, ge=1)
    recent: int = Field(0, ge=0)
    steps: int = Field(25, ge=1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples"})

    def fit(self, samples: KvSamples) -> dict[str, Tensor]:
        return {"keys.codebook": self._codebook(samples.keys), "values.codebook": self._codebook(samples.values)}

    def codecs(self, shape: HeadShape, params: Mapping[str, Tensor]) -> LayerCodecs:
        keys, values = (ProductTable(params[f"{side}.codebook"], self.block) for side in ("keys", "values"))
        return LayerCodecs(keys, values, self.sink, self.recent, self.recent)

    def _codebook(self, vectors: Tensor) -> Tensor:
        """float16 ``[parts, centroids, width]`` from ``vectors [tokens, H, D]``."""
        channels = vectors.shape[-1]
        if channels % self.width:
            raise RecipeError(
                f"width {self.width} does not divide the {channels} channels of a head; use one of "
                f"{', '.join(str(n) for n in range(1, 17) if channels % n == 0)}."
            )
        points, wanted = vectors.flatten(0, 1), POINTS_PER_CENTROID << self.code_bits
        if len(points) > wanted:
            points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:wanted]]
        parts = points.float().unflatten(-1, (-1, self.width)).unbind(1)
        return torch.stack([kmeans(part, 1 << self.code_bits, steps=self.steps) for part in parts]).to(torch.float16)
