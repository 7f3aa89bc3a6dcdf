"""What attention reads of coded keys and values on a GPU: tensors of codes by runs of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DENSE, CHANNEL, TOKEN, TABLE, PRODUCT, FLOAT8 = range(6)
KINDS = {"dense": DENSE, "channel": CHANNEL, "token": TOKEN, "table": TABLE, "product": PRODUCT, "float8": FLOAT8}
DEPTH = 16  # the fewest numbers of a product that a tensor core adds up


@dataclass(frozen=True)
class Outliers:
    """Numbers to be added: for each run ``values`` float16 and ``indices`` (uint8 or int16) ``[B, H or 1, ...,
    vectors, count]``, a vector being a token's channels or a channel's tokens of a block (``axis``)."""

    runs: tuple[tuple[Tensor, Tensor], ...]
    axis: Literal["token", "channel"]

    @property
    def count(self) -> int:
        return self.runs[0][0].shape[-1]


@dataclass(frozen=True)
class LowRank:
    """For each run float16 ``[B, H, blocks, block, rank]`` and ``[B, H, blocks, rank, D]``, whose product is added."""

    runs: tuple[tuple[Tensor, Tensor], ...]

    @property
    def rank(self) -> int:
        return self.runs[0][0].shape[-1]


@dataclass(frozen=True)
class Turns:
    """Rotary angles of keys that are stored without them. ``inv_freq`` float32 ``[rotated channels / 2]``, ``factor``
    by which keys get longer, and ``shift`` int64 ``[B]``: token t of a row is at position t + shift."""

    inv_freq: Tensor
    factor: float
    shift: Tensor

    def tables(self, channels: int, rows: int, origin: int, tokens: int, slots: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the places in a tile, float16 ``[slots, 2, rows, D / slots]``, and of the first
        positions of all tiles of ``tokens`` from ``origin`` on, float32 ``[B, tiles, 2, D]``; channels without RoPE
        have 1 and 0."""
        device = self.inv_freq.device
        inside = self._both(torch.arange(rows, device=device), channels)  # [2, rows, D]
        first = torch.arange(origin, origin + tokens, rows, device=device) + self.shift.to(device)[:, None]
        starts = self._both(first, channels)
        starts[..., : 2 * len(self.inv_freq)] *= self.factor
        inside = inside.unflatten(-1, (-1, slots)).permute(3, 0, 1, 2)
        return inside.half().contiguous(), starts.permute(1, 2, 0, 3).contiguous()

    def _both(self, positions: Tensor, channels: int) -> Tensor:
        """``[2, ..., D]``."""
        half = positions[..., None].float() * self.inv_freq
        angle = torch.cat([half, half, half.new_zeros(*half.shape[:-1], channels - 2 * half.shape[-1])], -1)
        return torch.stack([angle.cos(), angle.sin()])


@dataclass(frozen=True)
class Tiles:
    """Keys or values of all runs. ``runs``: for each run the tensors of its codes (or numbers), scale and zero (or
    offset), contiguous, ``[B, H, ...]``, or ``[B, 1, ...]`` if a token's row is that of all heads ``joined``.

    ``block``: tokens of a block of ``channel`` codes and of corrections. ``group``: tokens or channels that share a
    scale. ``lut``: float32 table of ``table`` codes; of ``product`` codes float16 ``[H, parts, entries, width]``.
    ``affine``: center and scale float32 ``[H, D]`` of what a table gives for keys. ``order`` int16 ``[H, D]``: which
    channels of a head of keys have their codes one after the other. ``spans``: of each run, how many
    tokens are skipped and how many there are in memory, where that is not just what is read. ``within``: tokens that a
    tile must not be longer than.
    """

    kind: str
    runs: tuple[tuple[Tensor, ...], ...]
    num_bits: int = 16
    block: int = 1
    group: int = 1
    lut: Tensor | None = None
    joined: bool = False
    affine: tuple[Tensor, Tensor] | None = None
    order: Tensor | None = None
    outliers: Outliers | None = None
    low_rank: LowRank | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    within: int | None = None

    def pointers(self, device: torch.device, run_tokens: int) -> Tensor:
        """Addresses int64 ``[8, runs]``: codes, scale, zero; outliers and their indices; both factors. The last row
        says how many tokens of a head are in memory, which ``run_tokens`` are unless ``spans`` says otherwise."""
        rows = []
        for number, run in enumerate(self.runs):
            skip, length = self.spans[number] if self.spans else (0, run_tokens)
            more = [(None, None) if part is None else part.runs[number] for part in (self.outliers, self.low_rank)]
            tensors = [*run, *[None] * (3 - len(run)), *more[0], *more[1]]
            rows.append([0 if tensor is None else _address(tensor, skip, length) for tensor in tensors] + [length])
        return torch.tensor(rows, dtype=torch.int64).T.contiguous().to(device)

    def pages(self, device: torch.device, lengths: Sequence[int], counts: Sequence[int], page: int) -> Tensor:
        """`pointers` where ``counts`` pages of ``page`` tokens of each run, which has ``lengths``, are runs of their
        own."""
        columns = []
        for number, (run, length, count) in enumerate(zip(self.runs, lengths, counts, strict=True)):
            skip = torch.arange(count) * page
            more = [(None, None) if part is None else part.runs[number] for part in (self.outliers, self.low_rank)]
            tensors = [*run, *[None] * (3 - len(run)), *more[0], *more[1]]
            rows = [
                torch.zeros_like(skip) if tensor is None else tensor.data_ptr() + skip * _head(tensor) // length
                for tensor in tensors
            ]
            columns.append(torch.stack([*rows, torch.full_like(skip, length)]))
        return torch.cat(columns, 1).to(device)

    def chunk(self, channels: int) -> int:
        """Codes of a chunk: 8, or fewer where their bits are not loaded at once, a row of ``channels`` has fewer chunks
        than a product adds up, or a tile would reach beyond a block of corrections; 0 where nothing fits."""
        if self.kind == "dense":
            return 1
        if self.kind == "product":
            assert self.lut is not None
            width = self.lut.shape[-1]
            return width if width % 2 == 0 and channels // width >= DEPTH else 0
        most = 8 if self.num_bits == 3 else 32 // self.num_bits
        if self.kind != "channel":
            most = min(most, channels // DEPTH)
        elif self.outliers is not None or self.low_rank is not None:
            most = min(most, self.block // DEPTH)
        if self.kind == "channel" and self.within is not None:
            most = min(most, self.within // DEPTH)
        return next((per for per in (8, 4, 2) if per <= most and per * self.num_bits in (8, 16, 24, 32)), 0)


def _address(tensor: Tensor, skip: int, length: int) -> int:
    """Where token ``skip`` of the first head's ``length`` begins."""
    return int(tensor.data_ptr()) + skip * _head(tensor) // length


def _head(tensor: Tensor) -> int:
    """Bytes of one head."""
    return tensor.numel() * tensor.element_size() // (tensor.shape[0] * tensor.shape[1])
