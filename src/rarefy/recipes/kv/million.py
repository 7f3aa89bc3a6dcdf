"""MILLION (Wang et al. 2025): product quantization, which channels of any size cannot stretch.

A head's vector is cut into sub-vectors of ``width`` channels, each replaced by the nearest of ``2 ** code_bits``
centroids, found by k-means on calibration data, for keys and values of every layer apart: ``code_bits / width`` bits
per number and nothing else. A query meets keys through a table of its products with all centroids (section 3.2).

Beyond the paper, the k-means may weigh points by squared gradients of the loss: a few tokens that attention depends on
lie where there are hardly any points, and without weights hardly any centroids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy.contracts import KvRecipe, kv_recipes
from rarefy.core.errors import RecipeError
from rarefy.kv.codecs import ProductTable
from rarefy.kv.plan import HeadShape, KvSamples, LayerCodecs
from rarefy.solvers.kmeans import kmeans

POINTS_PER_CENTROID = 64
MAX_POINTS = 1 << 20  # of which they are drawn
LEAST_WEIGHT = 0.02  # of the mean one, so that what has no gradient in calibration still has a place


@kv_recipes.register("million")
class Million(KvRecipe):
    """Product quantization. ``width``: neighbouring channels that share a code of ``code_bits``; ``steps`` of the
    k-means that finds the codebooks. ``importance``: what a squared error counts in it, its ``fisher`` information or
    ``equal``. ``rotated_keys``: code keys after RoPE. ``block``: tokens that are coded together, in 16 bits until there
    are as many. ``recent``: newest tokens that stay in 16 bits."""

    width: int = Field(2, ge=1)
    code_bits: int = Field(8, ge=1, le=8)
    importance: Literal["fisher", "equal"] = "fisher"
    rotated_keys: bool = True
    block: int = Field(64, ge=1)
    recent: int = Field(0, ge=0)
    steps: int = Field(25, ge=1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples", "fisher"} if self.importance == "fisher" else {"samples"})

    @property
    def pre_rope(self) -> bool:
        return not self.rotated_keys

    def fit(self, samples: KvSamples) -> dict[str, Tensor]:
        sides = {"keys": (samples.keys, samples.key_weight), "values": (samples.values, samples.value_weight)}
        return {f"{side}.codebook": self._codebook(*given) for side, given in sides.items()}

    def codecs(self, shape: HeadShape, params: Mapping[str, Tensor]) -> LayerCodecs:
        keys, values = (ProductTable(params[f"{side}.codebook"], self.block) for side in ("keys", "values"))
        return LayerCodecs(keys, values, self.sink, self.recent, self.recent, self.pre_rope)

    def _codebook(self, vectors: Tensor, weight: Tensor | None) -> Tensor:
        """float16 ``[parts, centroids, width]`` from ``vectors [tokens, H, D]`` and what their errors count."""
        channels = vectors.shape[-1]
        if channels % self.width:
            raise RecipeError(
                f"width {self.width} does not divide the {channels} channels of a head; use one of "
                f"{', '.join(str(n) for n in range(1, 17) if channels % n == 0)}."
            )
        generator = torch.Generator().manual_seed(0)
        points = vectors.flatten(0, 1)
        masses = torch.ones_like(points) if weight is None else weight.flatten(0, 1)
        if len(points) > MAX_POINTS:
            picks = torch.randperm(len(points), generator=generator)[:MAX_POINTS].to(points.device)
            points, masses = points[picks], masses[picks]
        parts = points.float().unflatten(-1, (-1, self.width)).unbind(1)
        means = masses.float().unflatten(-1, (-1, self.width)).mean(-1).unbind(1)
        found = [self._centroids(part, mass, generator) for part, mass in zip(parts, means, strict=True)]
        return torch.stack(found).to(torch.float16)

    def _centroids(self, points: Tensor, mass: Tensor, generator: torch.Generator) -> Tensor:
        """Centroids of ``points [n, width]``, found from so many draws as serve so many centroids."""
        # Drawn by the root of their mass, and weighed by the other half: near the density that two-dimensional
        # centroids of least error have (Zador 1982), so that the start is good and few draws tell much.
        chance = (mass + LEAST_WEIGHT * mass.mean()).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        draws = POINTS_PER_CENTROID << self.code_bits
        picks = torch.multinomial(chance.cpu(), draws, replacement=True, generator=generator).to(points.device)
        return kmeans(points[picks], 1 << self.code_bits, weight=chance[picks], steps=self.steps)
