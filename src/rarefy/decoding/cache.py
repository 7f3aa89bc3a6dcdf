"""Keys and values of one sequence, or of several, grown as they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import OptionError

FLOAT8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.float16, torch.bfloat16, FLOAT8)
LEAST = 1e-30  # of a head's part of a token; less is nothing


@dataclass(frozen=True)
class Kept:
    """``keys`` and ``values [..., kv_heads, capacity, head_dim]``; where they are E4M3, ``steps`` bfloat16
    ``[2, ..., kv_heads, capacity]``, which both are multiplied by, finite everywhere."""

    keys: Tensor
    values: Tensor
    steps: Tensor | None = None

    def __getitem__(self, index: Any) -> Kept:
        both = (slice(None), *(index if isinstance(index, tuple) else (index,)))
        return Kept(self.keys[index], self.values[index], None if self.steps is None else self.steps[both])

    def store(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Put ``keys`` and ``values [kv_heads, M, head_dim]`` at positions ``start`` to ``start + M``."""
        end = start + keys.shape[1]
        for number, (kept, x) in enumerate(((self.keys, keys), (self.values, values))):
            if self.steps is not None:
                x, self.steps[number, :, start:end] = coded(x)
            kept[:, start:end] = x

    def load(self, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``[kv_heads, end, head_dim]`` of the first positions."""
        if self.steps is None:
            return self.keys[:, :end].to(dtype), self.values[:, :end].to(dtype)
        keys, values = (
            (kept[:, :end].float() * step[:, :end, None].float()).to(dtype)
            for kept, step in zip((self.keys, self.values), self.steps, strict=True)
        )
        return keys, values


def coded(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., head_dim]`` in E4M3, and the steps bfloat16 that its vectors are multiplied by."""
    most = x.abs().amax(-1).float()
    step = torch.where(most > LEAST, most / torch.finfo(FLOAT8).max, 1.0).bfloat16()
    codes = x.float() * step.float().reciprocal()[..., None]
    return codes.clamp(-torch.finfo(FLOAT8).max, torch.finfo(FLOAT8).max).to(FLOAT8), step


class KeyValues:
    """``keys`` and ``values`` [layers, kv_heads, capacity, head_dim] in one dtype, of which ``length`` positions hold.

    In E4M3 every position of every head has a step, see `Kept`. A token's position is its index, so cutting the
    sequence short is setting ``length``; capacity doubles when needed.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        limit: int,
        device: torch.device | None = None,
    ):
        if dtype not in DTYPES:
            raise OptionError(f"A cache of {dtype} cannot be kept; use float32, float16, bfloat16 or float8_e4m3fn.")
        self.limit = limit
        self.length = 0
        self.keys = torch.empty(layers, kv_heads, 0, head_dim, dtype=dtype, device=device or torch.device("cpu"))
        self.values = torch.empty_like(self.keys)
        self.steps = self._steps() if dtype == FLOAT8 else None

    @property
    def capacity(self) -> int:
        return self.keys.shape[-2]

    @property
    def kept(self) -> Kept:
        """All of it."""
        return Kept(self.keys, self.values, self.steps)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions. Raises OptionError beyond the model's."""
        if length > self.limit:
            raise OptionError(f"{length} tokens do not fit the model's {self.limit} positions; shorten the text.")
        if length <= self.capacity:
            return
        before, capacity = self.capacity, min(max(length, 2 * self.capacity, 256), self.limit)
        capacity += capacity % 2  # kernels read two steps at once
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(*old.shape[:-2], capacity, old.shape[-1])
            new[..., :before, :] = old
            setattr(self, name, new)
        if self.steps is not None:
            old, self.steps = self.steps, self._steps()
            self.steps[..., :before] = old

    def store(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put ``keys`` and ``values`` [kv_heads, M, head_dim] at positions ``start`` to ``start + M``."""
        self.kept[layer].store(start, keys, values)

    def crop(self, length: int) -> None:
        """Forget what lies beyond the first ``length`` positions."""
        self.length = min(self.length, length)

    def byte_count(self) -> int:
        """Bytes that are allocated."""
        steps = 0 if self.steps is None else self.steps.numel() * self.steps.element_size()
        return 2 * self.keys.numel() * self.keys.element_size() + steps

    def _steps(self) -> Tensor:
        return self.keys.new_zeros(2, *self.keys.shape[:-1], dtype=torch.bfloat16)


class Sequences(KeyValues):
    """Keys and values of several sequences, ``[layers, sequences, kv_heads, capacity, head_dim]``.

    ``lengths``: how many positions of each hold; ``length`` is unused.
    """

    def __init__(self, sequences: int, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.lengths = [0] * sequences
        self.keys, self.values = (
            kept.new_empty(kept.shape[0], sequences, *kept.shape[1:]) for kept in (self.keys, self.values)
        )
        self.steps = None if self.steps is None else self._steps()
