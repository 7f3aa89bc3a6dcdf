"""One table of values for many vectors of which each has an affine map of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.formats.grids.lut import lloyd

MAX_VALUES = 1 << 19  # that a table is fitted to


@dataclass(frozen=True)
class SharedTable:
    """``x ~ center + scale * lut[code]`` for ``x [n, channels]``.

    ``lut`` float32 ``[2 ** num_bits]``, ascending; ``center`` and ``scale`` float32, of a shape that broadcasts to
    ``x``. ``kept`` bool as ``x``: numbers that the table stands for. ``cost``: what their squared errors count, in all.
    """

    lut: Tensor
    center: Tensor
    scale: Tensor
    kept: Tensor
    cost: float

    def normal(self, x: Tensor) -> Tensor:
        """``x`` as the table sees it."""
        return normal(x, self.center, self.scale)

    def nearest(self, x: Tensor) -> Tensor:
        """The values of the table for ``x``, before they are mapped back."""
        return _nearest(self.lut, self.normal(x))

    def error(self, x: Tensor) -> Tensor:
        """What codes of ``x`` are off by, 0 where that is stored."""
        return self.kept * (self.nearest(x) * self.scale + self.center - x)


def shared_table(
    x: Tensor, weight: Tensor | None, center: Tensor, scale: Tensor, num_bits: int, *,
    stored: int = 0, counts: Tensor | None = None, rounds: int = 4, refine: bool = False,
) -> SharedTable:  # fmt: skip
    """The table of least squared error for ``x [n, channels]``, of which the ``stored`` largest errors of each row,
    times ``counts [channels]`` (None: 1), are kept elsewhere and count nothing.

    ``weight`` as ``x`` (None: equal) is what a squared error counts. A range by quantiles leaves out as many numbers as
    are stored on average, but rows have many or none of them: so the table is fitted first to what lies within
    ``center +- scale``, and then, ``rounds`` times, to what is not among the largest errors that it leaves. With
    ``refine``, centers and scales ``[1, channels]`` are fitted as well, by least squares to the values that the numbers
    were given; the best of all rounds is returned.
    """
    best: SharedTable | None = None
    weight = torch.ones_like(x) if weight is None else weight
    kept = normal(x, center, scale).abs() <= 1
    for _ in range(max(1, rounds)):
        lut = _table(normal(x, center, scale), weight * scale.square() * kept, num_bits)
        values = _nearest(lut, normal(x, center, scale))
        error = values * scale + center - x
        sizes = error.abs() if counts is None else error.abs() * counts
        kept = torch.ones_like(kept).scatter_(1, sizes.topk(min(stored, x.shape[1])).indices, False)
        mass = weight * kept
        cost = float((mass * error.square()).sum(dtype=torch.float64))
        if best is None or cost < best.cost:
            best = SharedTable(lut, center, scale, kept, cost)
        if refine:
            center, scale = _affine(x, values, mass, center, scale)
    assert best is not None
    return best


def normal(x: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    """``x`` with ``center`` at 0 and ``scale`` as 1; channels without any spread are 0."""
    return (x - center) / torch.where(scale == 0, 1.0, scale)


def _table(normal: Tensor, mass: Tensor, num_bits: int) -> Tensor:
    chosen = mass.flatten().nonzero().squeeze(1)
    if len(chosen) > MAX_VALUES:
        picks = torch.randint(len(chosen), (MAX_VALUES,), generator=torch.Generator().manual_seed(0))
        chosen = chosen[picks.to(chosen.device)]
    if not len(chosen):
        return torch.linspace(-1, 1, 1 << num_bits, device=normal.device)
    return lloyd(normal.flatten()[chosen][None], mass.flatten()[chosen][None], 1 << num_bits)[0]


def _nearest(lut: Tensor, normal: Tensor) -> Tensor:
    return lut[torch.searchsorted((lut[1:] + lut[:-1]) / 2, normal.contiguous())]


def _affine(x: Tensor, values: Tensor, mass: Tensor, center: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Center and scale of each channel that bring ``values`` nearest to ``x``; as before where that is not defined."""
    total = mass.sum(0, keepdim=True)
    share = mass / total.clamp(min=torch.finfo(mass.dtype).tiny)
    mean_x, mean_y = (share * x).sum(0, keepdim=True), (share * values).sum(0, keepdim=True)
    spread = (share * (values - mean_y).square()).sum(0, keepdim=True)
    slope = (share * (values - mean_y) * (x - mean_x)).sum(0, keepdim=True) / spread
    usable = (total > 0) & (spread > 0) & (slope > 0) & slope.isfinite()
    return torch.where(usable, mean_x - slope * mean_y, center), torch.where(usable, slope, scale)
