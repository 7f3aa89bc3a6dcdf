"""The one thing that passes from selectors to executors: for each block of queries, the blocks of keys it reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.attention.reach import Blocks, Reach
from rarefy.core.errors import FormatError


@dataclass(frozen=True)
class BlockMap:
    """Lists of key blocks in compressed sparse rows. Row ``(b, m, i)`` is query block ``i`` of mask head ``m``.

    ``start``, ``whole``, ``count`` int32 ``[B, M, query blocks]``: a row's entries are ``columns[start : start +
    count]``. The first ``whole`` of them are blocks that each query of the row reaches as a whole; in those after them
    tokens have to be masked one by one. Both parts rise, and no block comes twice. Rows lie one after the other or, as
    kernels write them without waiting for a sum, at equal distances; what lies between rows is never read. ``columns``
    int32, and beside it ``level`` uint8: log2 of how many neighbouring keys of the block become one (None: 0). ``M``
    divides the query heads: mask head ``m`` serves ``H / M`` of them in a row.
    """

    block_q: int
    block_k: int
    start: Tensor
    whole: Tensor
    count: Tensor
    columns: Tensor
    reach: Reach
    level: Tensor | None = None

    @classmethod
    def from_mask(cls, keep: Tensor, reach: Reach, blocks: Blocks, level: Tensor | None = None) -> BlockMap:
        """The map that keeps ``keep`` bool ``[B, M, query blocks, key blocks]`` as far as it is in reach, with
        ``level`` uint8 of the same shape."""
        keep = keep & blocks.some
        whole = keep & blocks.full
        count = keep.sum(-1, dtype=torch.int32)
        part = torch.where(whole, 0, torch.where(keep, 1, 2)).to(torch.uint8)
        order = part.argsort(dim=-1, stable=True)
        levels = None if level is None else level.gather(-1, order)
        if keep.is_cuda:  # at equal distances: the length of `columns` must not depend on the data
            columns, levels = order.flatten(), None if levels is None else levels.flatten()
            start = torch.arange(count.numel(), device=keep.device, dtype=torch.int32) * keep.shape[-1]
        else:
            here = torch.arange(keep.shape[-1]) < count[..., None]
            columns, levels = order[here], None if levels is None else levels[here]
            start = count.flatten().cumsum(0, dtype=torch.int32) - count.flatten()
        return cls(
            blocks.block_q, blocks.block_k, start.reshape(count.shape), whole.sum(-1, dtype=torch.int32), count,
            columns.to(torch.int32), reach, levels,
        )  # fmt: skip

    @classmethod
    def from_lists(cls, lists: Tensor, reach: Reach, block_q: int, block_k: int) -> BlockMap:
        """The map of ``lists`` int ``[B, M, query blocks, n]`` (-1: nothing), in any order. Raises FormatError where a
        block is named twice or does not exist."""
        blocks = reach.blocks(block_q, block_k, lists.device)
        if lists.shape[2] != blocks.rows:
            raise FormatError(f"Lists of {lists.shape[2]} query blocks do not fit {blocks.rows} of {block_q} queries.")
        real = lists >= 0
        if bool((lists >= blocks.columns).any()):
            raise FormatError(f"Key block {int(lists.max())} is beyond the {blocks.columns} of {block_k} keys.")
        times = torch.zeros(*lists.shape[:3], blocks.columns, dtype=torch.int32, device=lists.device)
        times.scatter_add_(3, lists.clamp(min=0).long(), real.to(torch.int32))
        if bool((times > 1).any()):
            raise FormatError("A key block is named twice in one row of a block map; name it once.")
        return cls.from_mask(times > 0, reach, blocks)

    @property
    def rows(self) -> int:
        return self.count.shape[2]

    @property
    def key_blocks(self) -> int:
        return -(-self.reach.keys // self.block_k)

    def lists(self, width: int | None = None, fill: int = -1) -> Tensor:
        """The columns of every row, int32 ``[B, M, query blocks, width]``, ``fill`` behind a row's end. Without
        ``width`` as wide as the longest row (which makes a GPU wait)."""
        return self._spread(self.columns, self.start, self.count, width, fill)

    def partial_lists(self, width: int | None = None, fill: int = -1) -> tuple[Tensor, Tensor]:
        """How many blocks of every row have to be masked token by token, int32 ``[B, M, query blocks]``, and which."""
        count = self.count - self.whole
        return count, self._spread(self.columns, self.start + self.whole, count, width, fill)

    def levels(self, width: int | None = None) -> Tensor | None:
        """``level`` in the shape of `lists`."""
        return None if self.level is None else self._spread(self.level, self.start, self.count, width, 0)

    @staticmethod
    def _spread(entries: Tensor, start: Tensor, count: Tensor, width: int | None, fill: int) -> Tensor:
        width = int(count.max()) if width is None else width
        place = torch.arange(width, device=count.device)
        index = (start[..., None] + place).clamp(max=max(entries.numel() - 1, 0))
        if not entries.numel():
            return torch.full(index.shape, fill, dtype=entries.dtype, device=entries.device)
        return torch.where(place < count[..., None], entries[index], fill)

    def dense(self) -> Tensor:
        """Which blocks are kept, bool ``[B, M, query blocks, key blocks]``."""
        columns = self.lists()
        shape = (*self.count.shape, self.key_blocks + 1)
        keep = torch.zeros(shape, dtype=torch.bool, device=columns.device)
        return keep.scatter_(-1, columns.long().where(columns >= 0, shape[-1] - 1), True)[..., :-1]

    def kept(self) -> Tensor:
        """Blocks that are kept, int64 ``[M]``."""
        return self.count.sum((0, 2))

    def visible(self) -> Tensor | float:
        """Blocks that could be kept, of one mask head and all rows of the batch. A GPU is not waited for."""
        reach = self.reach
        alike = self.count.shape[0] // reach.batch / (1 if reach.mask is None else reach.mask.shape[1])
        return reach.visible(self.block_q, self.block_k, self.count.device) * alike

    def density(self) -> Tensor:
        """Share of the blocks in reach that is kept, by mask head, float32 ``[M]``."""
        return self.kept() / self.visible()

    def per_head(self, heads: int) -> BlockMap:
        """The same map with a list for each of ``heads`` query heads."""
        repeats = heads // self.count.shape[1]
        if repeats == 1:
            return self
        start, whole, count = (part.repeat_interleave(repeats, 1) for part in (self.start, self.whole, self.count))
        return replace(self, start=start, whole=whole, count=count)

    def newest(self) -> PaddedMap:
        """The lists of a map with one block of queries. A GPU is not waited for."""
        if self.rows != 1:
            raise FormatError(f"A padded map has one block of queries, this map has {self.rows}.")
        if self.columns.numel() == self.count.numel() * self.key_blocks:  # rows at equal distances
            index = self.columns.view(*self.count.shape[:2], -1)
        else:
            index = self.lists(self.key_blocks, fill=0)[:, :, 0].contiguous()
        return PaddedMap(index, self.count[:, :, 0].contiguous(), self.block_k)

    def check(self) -> None:
        """Raise FormatError where a query that sees any key reads no block, or an entry lies out of bounds (a GPU is
        waited for)."""
        seeing = self.reach.blocks(self.block_q, self.block_k, self.count.device).some.any(-1)
        empty = ((self.count == 0) & seeing).nonzero()
        if len(empty):
            row, head, block = empty[0].tolist()
            raise FormatError(f"Query block {block} of head {head} in row {row} reads no block of keys.")
        columns = self.lists()
        place = torch.arange(1, columns.shape[-1], device=columns.device)
        inside = (place < self.count[..., None]) & (place != self.whole[..., None])
        if bool((columns >= self.key_blocks).any()) or bool(((columns.diff(dim=-1) <= 0) & inside).any()):
            raise FormatError(f"Columns of a block map must rise within a row and stay below {self.key_blocks}.")


@dataclass(frozen=True)
class PaddedMap:
    """Key blocks of ``block_k`` tokens that the newest queries read, of fixed size so that it can be made within a CUDA
    graph: ``index`` int32 ``[B, M, capacity]``, of which the first ``count`` int32 ``[B, M]`` are blocks and the others
    may be anything."""

    index: Tensor
    count: Tensor
    block_k: int
