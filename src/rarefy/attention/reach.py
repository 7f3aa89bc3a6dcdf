"""Which keys each query of a pass may see, as numbers instead of a mask, and the same for blocks of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Reach:
    """What ``queries`` queries may see of ``keys`` keys. Query ``i`` is the key ``i + offset``.

    ``causal``: no key after itself. ``window``: only so many keys up to itself. ``first``, ``stop`` int64 ``[B]``: keys
    ``[first, stop)`` of a row are no padding. ``segment`` int64 ``[B, keys]``, never falling: sequences packed in a
    row, of which a query sees its own. ``mask`` bool ``[B, 1 or H, queries, keys]``: anything else; it says all.
    """

    queries: int
    keys: int
    offset: int
    causal: bool = True
    window: int | None = None
    first: Tensor | None = None
    stop: Tensor | None = None
    segment: Tensor | None = None
    mask: Tensor | None = None
    _kept: dict[object, object] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def last(cls, queries: int, keys: int, causal: bool = True) -> Reach:
        """The queries are the last keys, and nothing is padding."""
        return cls(queries, keys, keys - queries, causal)

    @property
    def plain(self) -> bool:
        """Whether every row of the batch sees alike, by causality and a window alone."""
        return all(part is None for part in (self.first, self.stop, self.segment, self.mask))

    @property
    def padded_causal(self) -> bool:
        """Whether nothing but causality, and padding in front of rows, hides keys."""
        return self.causal and all(part is None for part in (self.window, self.stop, self.segment, self.mask))

    @property
    def uneven(self) -> bool:
        """Whether a query may see keys that a later one of its block does not."""
        return not all(part is None for part in (self.window, self.segment, self.mask))

    @property
    def batch(self) -> int:
        """Rows whose reach may differ: B, or 1 if all are alike."""
        parts = (self.first, self.stop, self.segment, self.mask)
        return next((part.shape[0] for part in parts if part is not None), 1)

    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether ``query`` may see ``key`` in ``row`` of the batch: index tensors that broadcast, as does the result.

        A mask that differs between heads is not served here; see `between`.
        """
        if self.mask is not None:
            return self.mask[row, 0, query, key]
        place = query + self.offset
        seen = key < self.keys
        if self.causal:
            seen = seen & (key <= place)
        if self.window is not None:
            seen = seen & (key > place - self.window)
        if self.first is not None:
            seen = seen & (key >= self.first[row])
        if self.stop is not None:
            seen = seen & (key < self.stop[row])
        if self.segment is not None:
            top = self.keys - 1
            seen = seen & (self.segment[row, key.clamp(max=top)] == self.segment[row, place.clamp(0, top)])
        return seen

    def between(self, low: int, high: int, keys: Tensor) -> Tensor:
        """Whether queries ``[low, high)`` may see ``keys`` int64 ``[B, H, n]`` (-1: none): bool ``[B, H, high - low,
        n]``."""
        real = (keys >= 0)[:, :, None]
        index = keys.clamp(min=0)[:, :, None]
        if self.mask is not None:
            rows, heads = (max(pair) for pair in zip(self.mask.shape[:2], keys.shape[:2], strict=True))
            own = self.mask[:, :, low:high].expand(rows, heads, -1, -1)
            return own.gather(3, index.expand(rows, heads, high - low, -1)) & real
        row = torch.arange(self.batch, device=keys.device)[:, None, None, None]
        query = torch.arange(low, high, device=keys.device)[None, None, :, None]
        return (self.allowed(row, query, index) & real).expand(-1, -1, high - low, -1)

    def spans(self) -> tuple[Tensor, Tensor]:
        """Keys ``[low, high)`` that each query sees, int32 ``[B or 1, queries]``; only where there is no ``mask``."""
        return self.once("spans", self._spans)

    def _spans(self) -> tuple[Tensor, Tensor]:
        assert self.mask is None
        device = next((p.device for p in (self.first, self.stop, self.segment) if p is not None), None)
        place = (torch.arange(self.queries, device=device) + self.offset).expand(self.batch, -1)
        low, high = torch.zeros_like(place), torch.full_like(place, self.keys)
        if self.causal:
            high = torch.minimum(high, place + 1)
        if self.window is not None:
            low = torch.maximum(low, place - self.window + 1)
        if self.first is not None:
            low = torch.maximum(low, self.first[:, None])
        if self.stop is not None:
            high = torch.minimum(high, self.stop[:, None])
        if self.segment is not None:
            own = self.segment.gather(1, place.clamp(0, self.keys - 1)).contiguous()
            segment = self.segment.contiguous()
            low = torch.maximum(low, torch.searchsorted(segment, own))
            high = torch.minimum(high, torch.searchsorted(segment, own, right=True))
        return low.to(torch.int32), torch.maximum(low, high).to(torch.int32)

    def ends(self, batch: int, device: torch.device) -> Tensor:
        """Where the keys that the last query of each row may see end, int32 ``[batch]``."""
        return self.once(("ends", batch, device), lambda: self._ends(batch, device))

    def _ends(self, batch: int, device: torch.device) -> Tensor:
        end = min(self.keys, self.offset + self.queries) if self.causal else self.keys
        if self.stop is not None:
            return self.stop.clamp(max=end).to(torch.int32)
        return torch.full((batch,), end, dtype=torch.int32, device=device)

    def visible(self, block_q: int, block_k: int, device: torch.device) -> Tensor | float:
        """In how many pairs of a block of queries and one of keys something is seen, in all rows (B, or 1 if all are
        alike) and heads of a mask together. A GPU is not waited for."""
        return self.once(("visible", block_q, block_k), lambda: self._visible(block_q, block_k, device))

    def _visible(self, block_q: int, block_k: int, device: torch.device) -> Tensor | float:
        if not self.plain:
            return self.blocks(block_q, block_k, device).some.sum()
        begin = torch.arange(0, self.queries, block_q) + self.offset
        last = (begin + block_q).clamp(max=self.queries + self.offset) - 1
        low = torch.zeros_like(begin) if self.window is None else (begin - self.window + 1).clamp(min=0) // block_k
        high = last // block_k + 1 if self.causal else torch.full_like(begin, -(-self.keys // block_k))
        return float((high.clamp(max=-(-self.keys // block_k)) - low).clamp(min=0).sum())

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What ``make`` gives, made only once for each ``key``: all layers of a pass share a reach."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[return-value]

    def blocks(self, block_q: int, block_k: int, device: torch.device | None = None) -> Blocks:
        """The same for blocks of ``block_q`` queries and ``block_k`` keys."""
        return self.once(("blocks", block_q, block_k, device), lambda: self._blocks(block_q, block_k, device))

    def _blocks(self, block_q: int, block_k: int, device: torch.device | None) -> Blocks:
        rows, columns = -(-self.queries // block_q), -(-self.keys // block_k)
        if self.mask is not None:
            mask = self.mask
            room = (0, columns * block_k - self.keys, 0, rows * block_q - self.queries)
            some = torch.nn.functional.pad(mask, room).unflatten(3, (columns, block_k)).unflatten(2, (rows, block_q))
            # Queries beyond the last are nobody's; keys beyond the last have to stay hidden.
            room_q = (0, 0, 0, rows * block_q - self.queries)
            full = torch.nn.functional.pad(mask, (0, columns * block_k - self.keys))
            full = torch.nn.functional.pad(full, room_q, value=True)
            full = full.unflatten(3, (columns, block_k)).unflatten(2, (rows, block_q))
            return Blocks(block_q, block_k, some.any(5).any(3), full.all(5).all(3))
        device = next((p.device for p in (self.first, self.stop, self.segment) if p is not None), device)
        q0 = torch.arange(rows, device=device)[None, :, None] * block_q
        q1 = (q0 + block_q - 1).clamp(max=self.queries - 1)
        k0 = torch.arange(columns, device=device)[None, None, :] * block_k
        k1 = k0 + block_k - 1
        first = torch.zeros(1, dtype=torch.int64, device=device) if self.first is None else self.first
        stop = torch.full((1,), self.keys, device=device) if self.stop is None else self.stop
        first, stop = first[:, None, None], stop[:, None, None]
        begin, end = q0 + self.offset, q1 + self.offset
        above_end, above_begin = (end, begin) if self.causal else (stop - 1, stop - 1)
        # A query before the first key sees nothing, so a block begins where one after it does.
        seeing = torch.maximum(begin, first) if self.causal else begin
        below_begin = first if self.window is None else torch.maximum(first, seeing - self.window + 1)
        below_end = first if self.window is None else torch.maximum(first, end - self.window + 1)
        some = (k0 <= torch.minimum(above_end, stop - 1)) & (k1 >= below_begin) & (end >= seeing)
        full = (k1 <= torch.minimum(above_begin, stop - 1)) & (k0 >= below_end)
        if self.segment is not None:
            top = self.keys - 1
            ends = [self.segment[:, place.clamp(0, top).flatten()] for place in (begin, end, k0, k1)]
            q_low, q_high, k_low, k_high = ends[0][:, :, None], ends[1][:, :, None], ends[2][:, None], ends[3][:, None]
            some = some & (q_low <= k_high) & (k_low <= q_high)
            full = full & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        some, full = (part.expand(-1, rows, columns)[:, None] for part in (some, full))
        return Blocks(block_q, block_k, some, full)


@dataclass(frozen=True)
class Blocks:
    """``some`` and ``full`` bool ``[B or 1, 1 (H for a mask by head), query blocks, key blocks]``: whether any query of
    a block may see any key of the other, and whether each may see all."""

    block_q: int
    block_k: int
    some: Tensor
    full: Tensor

    @property
    def rows(self) -> int:
        return self.some.shape[2]

    @property
    def columns(self) -> int:
        return self.some.shape[3]
