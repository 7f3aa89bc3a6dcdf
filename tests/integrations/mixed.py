"""A recipe that gives every layer of a Llama another kind of term, so that one small checkpoint holds them all."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.contracts import Layer, Solution, WeightRecipe, weight_recipes
from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LevelGrid, LutGrid
from rarefy.formats.inputs import PermutedInput
from rarefy.formats.patterns import NM, Bitmap, Groups, Pattern
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms import Dense, Partition, Product, Quantized, Residual, Sparse, Term
from rarefy.solvers.rtn import round_to_nearest

INT4 = IntegerGrid(num_bits=4, group_size=8, zero="integer")


@weight_recipes.register("mixed_for_tests")
class Mixed(WeightRecipe):
    """By the layer's last name; see ``solve``."""

    def solve(self, layer: Layer) -> Solution:
        name, weight = layer.name, layer.weight
        kind = name.rpartition(".")[2]
        return Solution(getattr(self, f"_{kind}", self._other)(weight))

    def _q_proj(self, weight: Tensor) -> list[Term]:
        outliers = weight.abs() > weight.abs().flatten().kthvalue(weight.numel() - 12).values
        dense = round_to_nearest(weight.masked_fill(outliers, 0.0), FloatGrid(format="nf4", group_size=8))
        return [dense, Residual.from_weight(weight - dense.decode(), outliers)]

    def _k_proj(self, weight: Tensor) -> list[Term]:
        return [round_to_nearest(weight, LevelGrid(levels=3, group_size=16))]

    def _v_proj(self, weight: Tensor) -> list[Term]:
        return [Sparse.from_weight(weight, _largest_of_four(weight), NM(n=2, m=4, index="rank"))]

    def _o_proj(self, weight: Tensor) -> list[Term]:
        return [_quantized(weight, INT4, Bitmap(), weight.abs() > weight.abs().median())]

    def _gate_proj(self, weight: Tensor) -> list[Term]:
        return [round_to_nearest(weight, LutGrid(num_bits=3, rows_per_lut=4))]

    def _up_proj(self, weight: Tensor) -> list[Term]:
        return [round_to_nearest(weight, BinaryGrid(regions=3, group_size=16))]

    def _down_proj(self, weight: Tensor) -> list[Term]:
        left, right = weight[:, :24], weight[:, 24:]
        keep = left.abs().unflatten(1, (-1, 8)).sum(-1)
        groups = (keep >= keep.median()).repeat_interleave(8, dim=1)
        columns = torch.arange(24).flip(0).to(torch.int32)
        codes = round_to_nearest(
            right, IntegerGrid(num_bits=3, group_size=8, zero="float", scales=BilevelScale(rows=4))
        )
        spec = codes.spec.model_copy(update={"input": PermutedInput()})
        flipped = Quantized(spec, codes.shape, {**dict(codes.named_buffers()), "permutation": columns})
        return [
            Partition.of("columns", [_quantized(left, INT4, Groups(size=8, index="csr"), groups), flipped]),
            Product(Dense.from_weight(weight[:, :2].contiguous()), Dense.from_weight(weight[:2].contiguous() * 0.01)),
        ]

    def _other(self, weight: Tensor) -> list[Term]:
        return [round_to_nearest(weight, INT4)]


def _largest_of_four(weight: Tensor) -> Tensor:
    order = weight.abs().unflatten(1, (-1, 4)).argsort(-1, descending=True)[..., :2]
    return torch.zeros_like(weight, dtype=torch.bool).unflatten(1, (-1, 4)).scatter(-1, order, True).flatten(1)


def _quantized(weight: Tensor, grid: Grid, pattern: Pattern, mask: Tensor) -> Term:
    kept = weight * mask
    params = grid.fit(kept)
    return Quantized.from_codes(grid.encode(kept, params), params, grid, pattern=pattern, mask=mask)
