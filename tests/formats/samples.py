"""Every grid, pattern and kind of term, for tests that must hold for all of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rarefy import packing
from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LevelGrid, LutGrid, Params
from rarefy.formats.inputs import AnyInput, PermutedInput, RawInput, RotatedInput, ScaledInput
from rarefy.formats.patterns import NM, Bitmap, Full, Groups, Pattern
from rarefy.formats.scales import BilevelScale, SingleScale
from rarefy.formats.terms import Dense, Partition, Product, Quantized, Residual, Shared, Sparse, Term

# Odd sizes, one row, one column, groups longer than a row, ragged groups, more than one word of codes.
SHAPES = [(1, 1), (3, 5), (2, 32), (17, 77), (1, 129)]

FLOAT_FORMATS = ("fp3", "fp4", "nf3", "nf4", "fp6_e2m3", "fp8_e4m3", "fp8_e5m2")


def grids() -> dict[str, Grid]:
    """Name -> grid: every kind, code width, kind of zero and kind of scale."""
    table: dict[str, Grid] = {}
    for bits in range(1, 9):
        for zero in ("none", "integer", "float"):
            if (bits, zero) != (1, "none"):
                table[f"int{bits}-{zero}"] = IntegerGrid(num_bits=bits, zero=zero, group_size=16)
    for levels in (3, 5):
        for zero in ("none", "integer", "float"):
            table[f"level{levels}-{zero}"] = LevelGrid(levels=levels, zero=zero, group_size=16)
    for name in FLOAT_FORMATS:
        table[name] = FloatGrid(format=name, group_size=16)
    table["fp4-two"] = FloatGrid(format="fp4", two_scales=True, group_size=16)
    table["nf3-two"] = FloatGrid(format="nf3", two_scales=True, scales=SingleScale(dtype="bfloat16"), group_size=16)
    for dtype in ("bfloat16", "float32"):
        table[f"int4-{dtype}"] = IntegerGrid(zero="float", scales=SingleScale(dtype=dtype), group_size=16)
    table["int4-row"] = IntegerGrid(zero="integer")
    table["nf4-row"] = FloatGrid(format="nf4")
    table["int4-long"] = IntegerGrid(zero="float", group_size=1000)
    nibbles, octets = BilevelScale(rows=4, groups=2), BilevelScale(scale_bits=6, zero_bits=5, rows=16, groups=3)
    for zero in ("none", "integer", "float"):
        table[f"int3-bilevel-{zero}"] = IntegerGrid(num_bits=3, zero=zero, scales=nibbles, group_size=16)
        table[f"int4-bilevel8-{zero}"] = IntegerGrid(zero=zero, scales=octets, group_size=16)
    table["level3-bilevel"] = LevelGrid(scales=nibbles, group_size=16)
    table["fp4-bilevel"] = FloatGrid(format="fp4", scales=octets, group_size=16)
    table["lut3-row"] = LutGrid(num_bits=3)
    table["lut4-tensor"] = LutGrid(num_bits=4, rows_per_lut=None, dtype="float32")
    table["lut2-rows"] = LutGrid(num_bits=2, rows_per_lut=4)
    table["lut2-groups"] = LutGrid(num_bits=2, rows_per_lut=3, group_size=16, dtype="bfloat16")
    table["lut8-row"] = LutGrid(num_bits=8)
    for regions in (1, 2, 3, 4):
        table[f"binary{regions}"] = BinaryGrid(regions=regions, group_size=16)
    table["binary3-row"] = BinaryGrid(regions=3, group_size=None)
    return table


GRIDS = grids()


def patterns() -> dict[str, Pattern]:
    return {
        "full": Full(),
        "bitmap": Bitmap(),
        "2:4": NM(n=2, m=4),
        "2:4-rank": NM(n=2, m=4, index="rank"),
        "4:8-rank": NM(n=4, m=8, index="rank"),
        "3:7": NM(n=3, m=7),
        "groups-ids": Groups(size=16, index="ids"),
        "groups-csr": Groups(size=16, index="csr"),
        "groups-bitmap": Groups(size=16, index="bitmap"),
    }


PATTERNS = patterns()


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normal numbers with a few outliers, exactly representable in 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values[torch.rand(rows, columns, generator=generator) < 0.02] *= 8
    return values.half().float()


def mask_for(pattern: Pattern, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A random mask that keeps about half, as ``pattern`` allows."""
    generator = torch.Generator().manual_seed(seed + 1)
    if isinstance(pattern, Full):
        return torch.ones(rows, columns, dtype=torch.bool)
    if isinstance(pattern, Bitmap):
        return torch.rand(rows, columns, generator=generator) < 0.5
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    if isinstance(pattern, NM):
        for first in range(0, columns, pattern.m):
            length = min(pattern.m, columns - first)
            count = -(-pattern.n * length // pattern.m)
            kept = torch.rand(rows, length, generator=generator).argsort(1)[:, :count]
            mask[:, first : first + length].scatter_(1, kept, True)
        return mask
    assert isinstance(pattern, Groups)
    groups = -(-columns // pattern.size)
    if pattern.index == "ids":
        chosen = torch.zeros(rows, groups, dtype=torch.bool)
        chosen.scatter_(1, torch.rand(rows, groups, generator=generator).argsort(1)[:, : groups // 2], True)
    else:
        chosen = torch.rand(rows, groups, generator=generator) < 0.5
    return chosen.repeat_interleave(pattern.size, 1)[:, :columns]


def fits(grid: Grid, pattern: Pattern) -> bool:
    """Whether a quantized term may combine the two."""
    if pattern.group is None:
        return True
    return grid.group_size is None if grid.family == "lut" else grid.group_size == pattern.group


@functools.lru_cache(maxsize=1024)
def fitted(grid: Grid, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Params]:
    """Codes and rounded parameters of ``weight(rows, columns, seed)``."""
    dense = weight(rows, columns, seed)
    params = grid.fit(dense)
    return grid.encode(dense, params), params


def quantized(grid: Grid, pattern: Pattern, rows: int, columns: int, seed: int = 0, **options: Any) -> Quantized:
    """``weight(rows, columns, seed)`` on a grid at the positions of a random mask."""
    codes, params = fitted(grid, rows, columns, seed)
    mask = mask_for(pattern, rows, columns, seed)
    term = Quantized.from_codes(codes, params, grid, pattern=pattern, mask=mask, **options)
    return copy.deepcopy(term)  # since a test may change what it stores


def inputs(columns: int) -> dict[str, tuple[AnyInput, dict[str, Tensor]]]:
    """Name -> an input transform and its tensors."""
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(columns, generator=generator).to(torch.int32)
    signs = packing.pack_bitmap(torch.rand(columns, generator=generator) < 0.5)
    return {
        "raw": (RawInput(), {}),
        "permuted": (PermutedInput(), {"permutation": order}),
        "scaled": (ScaledInput(), {"input_scale": torch.rand(columns, generator=generator) + 0.5}),
        "scaled-half": (ScaledInput(dtype="float16"), {"input_scale": torch.full((columns,), 2.0).half()}),
        "rotated": (RotatedInput(), {"signs": signs}),
    }


def residual(rows: int, columns: int, seed: int = 0) -> Residual:
    dense = weight(rows, columns, seed)
    return Residual.from_weight(dense, dense.abs() > 1.5)


def terms(rows: int = 6, columns: int = 40) -> dict[str, Callable[[], Term]]:
    """Name -> maker of one term of each kind and of some combinations, all ``[rows, columns]`` and not stacked."""
    half = columns // 2
    int4, rank = IntegerGrid(zero="integer", group_size=16), 5

    def transformed(name: str) -> Quantized:
        spec, tensors = inputs(columns)[name]
        return quantized(int4, Full(), rows, columns, input=spec, input_tensors=tensors)

    def dictionary() -> Product:
        codes = weight(rank, columns, 3)
        return Product(
            Dense.from_weight(weight(rows, rank, 2)), Sparse.from_weight(codes, mask_for(Bitmap(), rank, columns))
        )

    def by_columns(indices: Tensor | None = None) -> Partition:
        parts: list[Term] = [quantized(int4, Full(), rows, half), Dense.from_weight(weight(rows, columns - half))]
        return Partition.of("columns", parts, indices)

    def by_rows(indices: Tensor | None = None) -> Partition:
        parts: list[Term] = [residual(2, columns), quantized(GRIDS["nf4-row"], Bitmap(), rows - 2, columns)]
        return Partition.of("rows", parts, indices)

    def mixed(seed: int) -> Tensor:
        return torch.randperm(rows if seed else columns, generator=torch.Generator().manual_seed(seed))

    table: dict[str, Callable[[], Term]] = {
        "integer": lambda: quantized(int4, Full(), rows, columns),
        "planes": lambda: quantized(int4, Full(), rows, columns, planes=True),
        "multiplier": lambda: quantized(int4, Full(), rows, columns, multiplier=2.0**-20),
        "bilevel": lambda: quantized(GRIDS["int4-bilevel8-float"], Full(), rows, columns),
        "ternary": lambda: quantized(GRIDS["level3-none"], Full(), rows, columns),
        "five": lambda: quantized(GRIDS["level5-float"], Bitmap(), rows, columns),
        "two scales": lambda: quantized(GRIDS["nf3-two"], Groups(size=16, index="csr"), rows, columns),
        "lut": lambda: quantized(GRIDS["lut3-row"], Full(), rows, columns),
        "binary": lambda: quantized(GRIDS["binary3"], Full(), rows, columns),
        "binary planes": lambda: quantized(GRIDS["binary3"], Full(), rows, columns, planes=True),
        "n:m": lambda: quantized(int4, NM(index="rank"), rows, columns),
        "groups": lambda: quantized(int4, Groups(size=16, index="ids"), rows, columns),
        "groups csr": lambda: quantized(GRIDS["int4-bilevel8-integer"], Groups(size=16, index="csr"), rows, columns),
        "groups bitmap": lambda: quantized(GRIDS["fp4-two"], Groups(size=16, index="bitmap"), rows, columns),
        "sparse": lambda: Sparse.from_weight(weight(rows, columns), mask_for(Bitmap(), rows, columns)),
        "sparse n:m": lambda: Sparse.from_weight(weight(rows, columns), mask_for(NM(), rows, columns), NM()),
        "residual": lambda: residual(rows, columns),
        "dense": lambda: Dense.from_weight(weight(rows, columns), "bfloat16"),
        "product": dictionary,
        "columns": by_columns,
        "columns ordered": lambda: by_columns(mixed(0)),
        "rows": by_rows,
        "rows ordered": lambda: by_rows(mixed(1)),
        "shared": lambda: Shared.of(quantized(int4, Full(), rows, columns), "owner"),
    }
    for index in ("ids", "csr", "bitmap"):
        pattern = Groups(size=16, index=index)
        table[f"sparse {index}"] = lambda pattern=pattern: Sparse.from_weight(  # type: ignore[misc]
            weight(rows, columns), mask_for(pattern, rows, columns), pattern, "float32"
        )
    for name in inputs(columns):
        if name != "raw":
            table[name] = lambda name=name: transformed(name)  # type: ignore[misc]
    return table


TERMS = terms()
