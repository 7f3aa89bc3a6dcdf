"""KVQuant (Hooper et al. 2024): keys by channel before RoPE, tables where the loss is sensitive, outliers apart.

Before RoPE a key's channels keep their size from token to token, so each has a range known beforehand (section 3.2),
and values have one for each token. Within the range one table of ``2 ** num_bits`` values for all keys of a layer, and
one for all values, minimises ``sum F (x - q)^2`` with the squared gradients ``F`` of the loss (section 3.3). The
largest errors of each token, over all heads, are stored (section 3.4), so that outliers stretch no range; the first
token stays in 16 bits (section 3.5). At 2 bits and below decoded values get the mean and spread of what they stand for
(Q-Norm).

Two things go beyond the paper. Ranges begin as its quantiles, but are then fitted, with the table, to what stored
errors leave over. And ``mean_bits`` gives the keys and values of each layer 2, 3 or 4 bits where ``sum F (x - q)^2``
says that they are worth most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy.allocate.budget import within_budget
from rarefy.contracts import KvRecipe, kv_recipes
from rarefy.kv.codec import Codec, Payload, part_of, prefixed
from rarefy.kv.codecs import ChannelTable, JoinedHeads, RangeTable, Residual, Sparse, Trimmed
from rarefy.kv.plan import HeadShape, KvSamples, LayerCodecs
from rarefy.saliency import relative
from rarefy.solvers.shared_table import SharedTable, shared_table

BLOCK = 32  # tokens coded together: any number codes the same
MAX_NUMBERS = 1 << 23  # of keys, and of values, that a layer is fitted to
LEAST_COUNT = 0.05  # of the mean one: what a channel's errors count that has no gradient in calibration
SIDES = ("keys", "values")
MIXED_BITS = (2, 3, 4)


@kv_recipes.register("kv_quant")
class KvQuant(KvRecipe):
    """Fitted tables with outliers. ``outliers``: share of a token's numbers, over all heads, that are stored as their
    error: the largest ones, of keys by the roots of what they count. ``importance``: what a squared error counts when
    tables are fitted: its ``fisher`` information or ``equal``. ``mean_bits``: in the place of ``num_bits``, what the
    keys and values of all layers take on average, where each side of a layer has 2, 3 or 4. ``refine``: whether keys'
    ranges are fitted, or remain the quantiles that ``outliers`` says. ``rotated_keys``: code keys after RoPE.
    ``q_norm``: null means at 2 bits and below. ``recent``: newest tokens that stay in 16 bits."""

    recipe_version: ClassVar[int] = 2  # which errors are stored depends on what they count

    sink: int = Field(1, ge=0)
    num_bits: int = Field(3, ge=1, le=8)
    mean_bits: float | None = Field(None, ge=2, le=4)
    outliers: float = Field(0.01, ge=0, le=0.5)
    importance: Literal["fisher", "equal"] = "fisher"
    refine: bool = True
    rotated_keys: bool = False
    q_norm: bool | None = None
    recent: int = Field(0, ge=0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples"} if self.importance == "equal" else {"samples", "fisher"})

    @property
    def pre_rope(self) -> bool:
        return not self.rotated_keys

    def fit(self, samples: KvSamples) -> dict[str, Tensor]:
        inside = (samples.places >= self.sink).nonzero().squeeze(1)
        most = max(1, MAX_NUMBERS // samples.keys[0].numel())
        if len(inside) > most:
            picks = torch.randperm(len(inside), generator=torch.Generator().manual_seed(0))[:most]
            inside = inside[picks.sort().values.to(inside.device)]
        keys, values = samples.keys[inside].flatten(1).float(), samples.values[inside].flatten(1).float()
        weights = [None if w is None else w[inside].flatten(1) for w in (samples.key_weight, samples.value_weight)]
        if self.mean_bits is None:
            return self._sides(keys, values, weights, self.num_bits)
        tables = {bits: self._sides(keys, values, weights, bits) for bits in MIXED_BITS}
        return {f"{bits}.{name}": tensor for bits, own in tables.items() for name, tensor in own.items()}

    def settle(self, params: Mapping[int, Mapping[str, Tensor]]) -> Mapping[int, Mapping[str, Tensor]]:
        if self.mean_bits is None:
            return params
        skipped = {len(params) + layer if layer < 0 else layer for layer in self.skip_layers}
        halves = [(layer, side) for layer in params if layer not in skipped for side in SIDES]
        costs = [[float(params[layer][f"{bits}.{side}.cost"]) for bits in MIXED_BITS] for layer, side in halves]
        chosen = within_budget(costs, MIXED_BITS, self.mean_bits * len(halves))
        found: dict[int, Payload] = {layer: {} for layer in params}
        for (layer, side), choice in zip(halves, chosen, strict=True):
            own = part_of(dict(params[layer]), f"{MIXED_BITS[choice]}.{side}")
            found[layer] |= prefixed(side, own)
        return found

    def codecs(self, shape: HeadShape, params: Mapping[str, Tensor]) -> LayerCodecs:
        widths = shape.heads * shape.key_channels, shape.heads * shape.value_channels
        keys: Codec = ChannelTable(
            params["keys.lut"], params["keys.center"][None], params["keys.scale"][None], BLOCK,
            params.get("keys.decoded"),
        )  # fmt: skip
        values: Codec = RangeTable(params["values.lut"], BLOCK, widths[1], params.get("values.decoded"))
        counts = [self._count(width) for width in widths]
        if counts[0]:
            keys = Residual(keys, Sparse(counts[0], "token", BLOCK, widths[0], params["keys.counts"]))
        if counts[1]:
            values = Residual(Trimmed(values, counts[1] // 2, "token"), Sparse(counts[1], "token", BLOCK, widths[1]))
        keys, values = JoinedHeads(keys, shape.heads), JoinedHeads(values, shape.heads)
        return LayerCodecs(keys, values, self.sink, self.recent, self.recent, self.pre_rope)

    def _count(self, width: int) -> int:
        """Stored errors of a token of ``width`` numbers: an even number, so that both ends of a range lose as many."""
        return 2 * round(self.outliers * width / 2)

    def _sides(self, keys: Tensor, values: Tensor, weights: list[Tensor | None], num_bits: int) -> dict[str, Tensor]:
        """Parameters of both sides, from ``keys`` and ``values [tokens, H * D]`` and what their errors count."""
        count, rows = self._count(keys.shape[1]), keys.sort(0).values
        cut = round(self.outliers / 2 * (len(keys) - 1))
        center, scale = (part[None] for part in _middle(rows[cut], rows[len(keys) - 1 - cut]))
        counts = torch.ones_like(keys[0]) if weights[0] is None else weights[0].float().mean(0).sqrt()
        counts = relative(counts, LEAST_COUNT)
        table = shared_table(keys, weights[0], center, scale, num_bits, stored=count, counts=counts, refine=self.refine)
        found = {"keys.center": table.center[0], "keys.scale": table.scale[0], "keys.counts": counts}
        found |= self._table("keys", keys, weights[0], table)
        count, rows = self._count(values.shape[1]), values.sort(1).values
        center, scale = _middle(rows[:, count // 2, None], rows[:, values.shape[1] - 1 - count // 2, None])
        table = shared_table(values, weights[1], center, scale, num_bits, stored=count, rounds=2)
        return found | self._table("values", values, weights[1], table)

    def _table(self, side: str, x: Tensor, weight: Tensor | None, table: SharedTable) -> dict[str, Tensor]:
        """A side's table, what it is decoded to, and what its errors cost."""
        error = table.error(x).square()
        cost = (error if weight is None else weight * error).sum(dtype=torch.float64)
        found = {f"{side}.lut": table.lut, f"{side}.cost": cost.float()}
        if len(table.lut) <= 4 if self.q_norm is None else self.q_norm:
            normal, coded = table.normal(x)[table.kept], table.nearest(x)[table.kept]
            stretch = normal.std() / coded.std().clamp(min=1e-6)
            found[f"{side}.decoded"] = table.lut * stretch + (normal.mean() - coded.mean() * stretch)
        return found


def _middle(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Center and half width of a range."""
    return (high + low) / 2, (high - low) / 2
