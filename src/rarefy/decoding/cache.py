"""Keys and values of one sequence, or of several, grown as they do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import OptionError


class KeyValues:
    """``keys`` and ``values`` [layers, kv_heads, capacity, head_dim] in one dtype, of which ``length`` positions hold.

    A token's position is its index, so cutting the sequence short is setting ``length``; capacity doubles when needed.
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
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise OptionError(f"A cache of {dtype} cannot be kept; use float32, float16 or bfloat16.")
        self.limit = limit
        self.length = 0
        self.keys = torch.empty(layers, kv_heads, 0, head_dim, dtype=dtype, device=device or torch.device("cpu"))
        self.values = torch.empty_like(self.keys)

    @property
    def capacity(self) -> int:
        return self.keys.shape[-2]

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions. Raises OptionError beyond the model's."""
        if length > self.limit:
            raise OptionError(f"{length} tokens do not fit the model's {self.limit} positions; shorten the text.")
        if length <= self.capacity:
            return
        capacity = min(max(length, 2 * self.capacity, 256), self.limit)
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(*old.shape[:-2], capacity, old.shape[-1])
            new[..., : old.shape[-2], :] = old
            setattr(self, name, new)

    def store(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put ``keys`` and ``values`` [kv_heads, M, head_dim] at positions ``start`` to ``start + M``."""
        end = start + keys.shape[1]
        self.keys[layer, :, start:end] = keys
        self.values[layer, :, start:end] = values

    def crop(self, length: int) -> None:
        """Forget what lies beyond the first ``length`` positions."""
        self.length = min(self.length, length)

    def byte_count(self) -> int:
        """Bytes that are allocated."""
        return 2 * self.keys.numel() * self.keys.element_size()


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
