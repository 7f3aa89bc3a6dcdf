"""Random layers for the CPU benchmarks, what they are held against, and how far they are from float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.formats.grids import FloatGrid, Grid, IntegerGrid, LevelGrid, LutGrid
from rarefy.formats.patterns import Bitmap, Full, Pattern
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms import Quantized, Residual, Sparse, Term
from rarefy.kernels import cpu
from rarefy.kernels.cpu.library import read
from rarefy.kernels.cpu.memory import in_huge_pages


@dataclass(frozen=True)
class Job:
    """A representation to time; ``density`` below 1 prunes at random, ``outliers`` is a share of weights.

    ``beside``: the job of ours that it is held against.
    """

    name: str
    goal: str
    grid: Grid | None
    density: float = 1.0
    outliers: float = 0.0
    beside: str | None = None


def integer(bits: int, group: int) -> IntegerGrid:
    return IntegerGrid(num_bits=bits, zero="integer", group_size=group)


JOBS = {
    job.name: job
    for job in (
        Job("int4 g32", "C1", integer(4, 32)),
        Job("int4 g128", "C1", integer(4, 128)),
        Job("int3 g128", "C1", integer(3, 128)),
        Job("int2 g128", "C1", integer(2, 128)),
        Job("int1 g128", "C1", integer(1, 128)),
        Job("ternary g128", "C1", LevelGrid(levels=3, group_size=128)),
        Job("int8 g128", "C1", integer(8, 128)),
        Job("nf4 g128", "C1", FloatGrid(format="nf4", group_size=128)),
        Job("fp4 two scales g128", "C1", FloatGrid(format="fp4", two_scales=True, group_size=128)),
        Job("lut4 row", "C1", LutGrid(num_bits=4)),
        Job("int3 g16 two-level", "C1", IntegerGrid(num_bits=3, zero="float", group_size=16, scales=BilevelScale())),
        Job("int3 g128 + 0.45%", "C6", integer(3, 128), outliers=0.0045, beside="int3 g128"),
        Job("int8 g128, 20% kept", "C6", integer(8, 128), density=0.2, beside="int8 g128"),
        Job("int4 g128, 50% kept", "C6", integer(4, 128), density=0.5, beside="int4 g128"),
        Job("float16, 50% kept", "C6", None, density=0.5),
    )
}


def stored_terms(job: Job, rows: int, columns: int) -> list[Term]:
    """The job's terms over a weight of normal numbers; parameters are fitted on a few rows and repeated."""
    weight = torch.randn(rows, columns)
    mask = torch.rand(rows, columns) < job.density if job.density < 1 else torch.ones(rows, columns, dtype=torch.bool)
    pattern: Pattern = Bitmap() if job.density < 1 else Full()
    if job.grid is None:
        return [Sparse.from_weight(weight, mask, pattern)]
    sample = weight[:64]
    fitted = job.grid.fit(sample)
    params = {name: tensor.repeat(rows // 64, *([1] * (tensor.dim() - 1))) for name, tensor in fitted.items()}
    codes = torch.randint(0, job.grid.code_count, (rows, columns), dtype=torch.uint8)
    terms: list[Term] = [Quantized.from_codes(codes, params, job.grid, pattern=pattern, mask=mask)]
    if job.outliers:
        terms.append(Residual.from_weight(weight, torch.rand(rows, columns) < job.outliers))
    return terms


def rounded(x: Tensor, made: cpu.Prepared) -> Tensor:
    """Activations as ``fast`` execution reads them for a term, float64: 8 bits for each block of columns."""
    size, columns = made.numbers["group_size"], made.columns
    block = 128 if size >= columns else min(128, size & -size)
    whole = torch.nn.functional.pad(x, (0, -columns % block)).unflatten(1, (-1, block))
    top = whole.abs().amax(-1, keepdim=True)
    codes = torch.round(whole * torch.where(top > 0, torch.full_like(top, 127) / top, 0.0))
    return (codes.double() * (top / 127).double()).flatten(1)[:, :columns]


def largest_error(terms: Sequence[cpu.Prepared], x: Tensor, fast: bool) -> float:
    """Largest error against float64, relative to the root mean square of the result; ``fast`` on its rounded ``x``."""
    wanted: Tensor | float = 0.0
    for term in terms:
        own = rounded(x, term) if fast and term.multiplies_bytes else x.double()
        wanted = wanted + own @ cpu.decode([term]).double().T
    assert isinstance(wanted, Tensor)
    return float((cpu.linear(x, terms, fast).double() - wanted).abs().max() / wanted.square().mean().sqrt())


def streaming(size: int) -> Callable[[], object]:
    """Reads ``size`` bytes once, in order, and does nothing with them."""
    data = in_huge_pages(size).random_()
    return lambda: read(data)
