"""KVQuant (Hooper et al. 2024): keys by channel before RoPE, tables where the loss is sensitive, outliers apart.

Before RoPE a key's channels keep their size from token to token, so each has a range known beforehand (section 3.2),
and values have one for each token. Within the range one table of ``2 ** num_bits`` values for all keys of a layer, and
one for all values, minimises ``sum F (x - q)^2`` with the squared gradients ``F`` of the loss (section 3.3). The
largest errors of each token, over all heads, are stored (section 3.4), so that outliers stretch no range; the first
token stays in 16 bits (section 3.5). At 2 bits and below decoded values get the mean and spread of what they stand for
(Q-Norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy.contracts import KvRecipe, kv_recipes
from rarefy.formats.grids.lut import lloyd
from rarefy.kv.codec import Codec
from rarefy.kv.codecs import ChannelTable, JoinedHeads, RangeTable, Residual, Sparse, Trimmed
from rarefy.kv.plan import HeadShape, KvSamples, LayerCodecs

BLOCK = 32  # tokens coded together: any number codes the same
MAX_VALUES = 1 << 20  # that a table is fitted to


@kv_recipes.register("kv_quant")
class KvQuant(KvRecipe):
    """Fitted tables with outliers. ``outliers``: share of a token's numbers, over all heads, that are stored as their
    error. ``importance``: what a squared error counts, its ``fisher`` information or ``equal``. ``rotated_keys``: code
    keys after RoPE. ``q_norm``: null means at 2 bits and below. ``recent``: newest tokens that stay in 16 bits."""

    sink: int = Field(1, ge=0)
    num_bits: int = Field(3, ge=1, le=8)
    outliers: float = Field(0.01, ge=0, le=0.5)
    importance: Literal["fisher", "equal"] = "fisher"
    rotated_keys: bool = False
    q_norm: bool | None = None
    recent: int = Field(0, ge=0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples", "fisher"} if self.importance == "fisher" else {"samples"})

    @property
    def pre_rope(self) -> bool:
        return not self.rotated_keys

    def fit(self, samples: KvSamples) -> dict[str, Tensor]:
        inside = samples.places >= self.sink
        keys, values = samples.keys[inside].flatten(1).float(), samples.values[inside].flatten(1).float()
        weights = [None if w is None else w[inside].flatten(1) for w in (samples.key_weight, samples.value_weight)]
        order = keys.sort(0).values
        cut = round(self.outliers / 2 * (len(keys) - 1))
        low, high = order[cut], order[len(keys) - 1 - cut]
        center, scale = (high + low) / 2, (high - low) / 2
        found = {"keys.center": center, "keys.scale": scale, **self._table("keys", keys, center, scale, weights[0])}
        trim = self._count(values.shape[1]) // 2
        order = values.sort(1).values
        low, high = order[:, trim, None], order[:, values.shape[1] - 1 - trim, None]
        return {**found, **self._table("values", values, (high + low) / 2, (high - low) / 2, weights[1])}

    def codecs(self, shape: HeadShape, params: Mapping[str, Tensor]) -> LayerCodecs:
        widths = shape.heads * shape.key_channels, shape.heads * shape.value_channels
        keys: Codec = ChannelTable(
            params["keys.lut"], params["keys.center"][None], params["keys.scale"][None], BLOCK,
            params.get("keys.decoded"),
        )  # fmt: skip
        values: Codec = RangeTable(params["values.lut"], BLOCK, widths[1], params.get("values.decoded"))
        counts = [self._count(width) for width in widths]
        if counts[0]:
            keys = Residual(keys, Sparse(counts[0], "token", BLOCK, widths[0]))
        if counts[1]:
            values = Residual(Trimmed(values, counts[1] // 2, "token"), Sparse(counts[1], "token", BLOCK, widths[1]))
        keys, values = JoinedHeads(keys, shape.heads), JoinedHeads(values, shape.heads)
        return LayerCodecs(keys, values, self.sink, self.recent, self.recent, self.pre_rope)

    def _count(self, width: int) -> int:
        """Stored errors of a token of ``width`` numbers: an even number, so that both ends of a range lose as many."""
        return 2 * round(self.outliers * width / 2)

    def _table(self, side: str, x: Tensor, center: Tensor, scale: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """The table of numbers ``x`` that lie within ``center`` +- ``scale``, and what it is decoded to."""
        normal = ((x - center) / torch.where(scale == 0, 1.0, scale)).flatten()
        # A squared error of the number itself is scale^2 times that of the normalised one.
        mass = None if weight is None else (weight * scale.square()).flatten()
        chosen = (normal.abs() <= 1).nonzero().squeeze(1)
        if len(chosen) > MAX_VALUES:
            picks = torch.randint(len(chosen), (MAX_VALUES,), generator=torch.Generator().manual_seed(0))
            chosen = chosen[picks.to(chosen.device)]
        normal, mass = normal[chosen], None if mass is None else mass[chosen]
        lut = lloyd(normal[None], None if mass is None else mass[None], 1 << self.num_bits)[0]
        found = {f"{side}.lut": lut}
        if self.num_bits <= 2 if self.q_norm is None else self.q_norm:
            coded = lut[torch.searchsorted((lut[1:] + lut[:-1]) / 2, normal)]
            stretch = normal.std() / coded.std().clamp(min=1e-6)
            found[f"{side}.decoded"] = lut * stretch + (normal.mean() - coded.mean() * stretch)
        return found
