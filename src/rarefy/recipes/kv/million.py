"""MILLION (Wang et al. 2025): product quantization, which channels of any size cannot stretch.

A head's vector is cut into sub-vectors of ``width`` channels, each replaced by the nearest of ``2 ** code_bits``
centroids, found by k-means on calibration data, for keys and values of every head apart: ``code_bits / width`` bits per
number and nothing else. A query meets keys through a table of its products with all centroids (section 3.2).

Beyond the paper, the k-means may weigh points by squared gradients of the loss: a few tokens that attention depends on
lie where there are hardly any points, and without weights hardly any centroids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy.contracts import KvRecipe, kv_recipes
from rarefy.core.errors import RecipeError
from rarefy.kv.codec import Codec, Payload, part_of, prefixed
from rarefy.kv.codecs import Permuted, ProductTable
from rarefy.kv.plan import HeadShape, KvSamples, LayerCodecs
from rarefy.saliency import relative
from rarefy.solvers.kmeans import kmeans

POINTS_PER_CENTROID = 64
LEAST_WEIGHT = 0.02  # of the mean one, so that what has no gradient in calibration still has a place


@kv_recipes.register("million")
class Million(KvRecipe):
    """Product quantization. ``width``: neighbouring channels that share a code of ``code_bits``; ``steps`` of the
    k-means that finds the codebooks. ``importance``: what a squared error counts in it, its ``fisher`` information or
    ``equal``. ``rotated_keys``: code keys after RoPE. ``block``: tokens that are coded together, in 16 bits until there
    are as many. ``recent``: newest tokens that stay in 16 bits."""

    recipe_version: ClassVar[int] = 2  # codebooks of each head

    width: int = Field(2, ge=1)
    code_bits: int = Field(8, ge=1, le=8)
    importance: Literal["fisher", "equal"] = "fisher"
    rotated_keys: bool = True
    block: int = Field(64, ge=1)
    recent: int = Field(0, ge=0)
    steps: int = Field(12, ge=1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples", "fisher"} if self.importance == "fisher" else {"samples"})

    @property
    def pre_rope(self) -> bool:
        return not self.rotated_keys

    def fit(self, samples: KvSamples) -> dict[str, Tensor]:
        keys = self._fitted(samples.keys, samples.key_weight, ordered=True)
        return prefixed("keys", keys) | prefixed("values", self._fitted(samples.values, samples.value_weight))

    def codecs(self, shape: HeadShape, params: Mapping[str, Tensor]) -> LayerCodecs:
        keys = self._table(part_of(dict(params), "keys"), shape, shape.key_channels)
        values = self._table(part_of(dict(params), "values"), shape, shape.value_channels)
        return LayerCodecs(keys, values, self.sink, self.recent, self.recent, self.pre_rope)

    def _fitted(self, vectors: Tensor, weight: Tensor | None, ordered: bool = False) -> dict[str, Tensor]:
        """Of ``vectors [tokens, H, D]`` and what their errors count: ``codebook`` float16 ``[H, parts, centroids,
        width]``, ``weight`` float32 ``[H, D]`` of its channels and, if ``ordered``, which ones they are, ``order``."""
        heads, channels = vectors.shape[1:]
        if channels % self.width:
            raise RecipeError(
                f"width {self.width} does not divide the {channels} channels of a head; use one of "
                f"{', '.join(str(n) for n in range(1, 17) if channels % n == 0)}."
            )
        x, masses = vectors.float(), torch.ones_like(vectors) if weight is None else weight.float()
        found: dict[str, Tensor] = {}
        if ordered:
            order = _balanced(masses.mean(0) * x.var(0), self.width)
            found["order"] = order.to(torch.int16)
            x, masses = (each.take_along_dim(order[None], -1) for each in (x, masses))
        counts = relative(masses.mean(0), LEAST_WEIGHT)
        stretch = counts.sqrt()
        points, mass = (
            each.unflatten(-1, (-1, self.width)).permute(1, 2, 0, 3).flatten(0, 1)  # [H * parts, tokens, width]
            for each in (x * stretch, masses / counts)
        )
        mass = mass.mean(-1)
        # Drawn by the root of their mass, and weighed by the other half: near the density that two-dimensional
        # centroids of least error have (Zador 1982), so that the start is good and few draws tell much.
        chance = (mass + LEAST_WEIGHT * mass.mean(-1, True)).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        picks = _draws(chance, POINTS_PER_CENTROID << self.code_bits)
        centers = kmeans(
            points.take_along_dim(picks[..., None], 1), 1 << self.code_bits, weight=chance.take_along_dim(picks, 1),
            steps=self.steps,
        )  # fmt: skip
        by_channel = stretch.unflatten(-1, (-1, 1, self.width))
        codebook = centers.unflatten(0, (heads, -1)) / by_channel
        return found | {"codebook": codebook.to(torch.float16), "weight": counts}

    def _table(self, params: Payload, shape: HeadShape, channels: int) -> Codec:
        """The codec of `_fitted` parameters. Raises RecipeError for those of another model."""
        sizes = {
            "codebook": (shape.heads, channels // self.width, 1 << self.code_bits, self.width),
            "weight": (shape.heads, channels), "order": (shape.heads, channels),
        }  # fmt: skip
        order = params.get("order")
        right = {"codebook", "weight"} <= params.keys() <= sizes.keys()
        right = right and all(tensor.shape == sizes[name] for name, tensor in params.items())
        if not right or (order is not None and bool((order.sort(-1).values != torch.arange(channels)).any())):
            raise RecipeError(
                f"Codebooks of layer {shape.layer} are not for {shape.heads} heads of {channels} channels; "
                "calibrate again."
            )
        table = ProductTable(params["codebook"], self.block, params["weight"])
        return table if order is None else Permuted(table, order)


def _balanced(gain: Tensor, width: int) -> Tensor:
    """An order int64 ``[H, D]`` of channels in which each ``width`` of them have about the same product of ``gain [H,
    D]``: those that gain most from their code's bits share it with those that gain least."""
    rows = gain.argsort(-1, descending=True).unflatten(-1, (width, -1))
    turned = [row.flip(-1) if number % 2 else row for number, row in enumerate(rows.unbind(1))]
    return torch.stack(turned, -1).flatten(1)


def _draws(chance: Tensor, count: int) -> Tensor:
    """Places int64 ``[n, count]`` in rows of ``chance [n, size]``, with replacement, one from each of equal shares."""
    ends = chance.double().cumsum(-1)
    shares = (torch.arange(count) + torch.rand(count, generator=torch.Generator().manual_seed(0))) / count
    shares = shares.to(ends) * ends[:, -1:]
    return torch.searchsorted(ends, shares, right=True).clamp(max=chance.shape[-1] - 1)
