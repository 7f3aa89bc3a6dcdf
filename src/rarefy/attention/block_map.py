"""The one thing that passes from selectors to executors: for each block of queries, the blocks of keys it reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.attention.reach import Blocks, Reach
from rarefy.core.errors import FormatError

PARTIAL = 1  # flag: tokens of the block have to be masked one by one
LEVEL_SHIFT, LEVEL_MASK = 1, 7  # flag bits 1-3: log2 of how many neighbouring keys were made one


@dataclass(frozen=True)
class BlockMap:
    """Lists of key blocks in compressed sparse rows. Row ``(b, m, i)`` is query block ``i`` of mask head ``m``.

    ``start``, ``count`` int32 ``[B, M, query blocks]``: a row's entries are ``columns[start : start + count]``. Rows
    lie one after the other or, as kernels write them without waiting for a sum, at equal distances; what lies between
    rows is never read. ``columns`` int32: key blocks, rising within a row, each once. ``flags`` uint8 beside
    ``columns``: bit 0 (`PARTIAL`) where some token is out of reach, bits 1-3 the level. ``M`` divides the query heads:
    mask head ``m`` serves ``H / M`` of them in a row.
    """

    block_q: int
    block_k: int
    start: Tensor
    count: Tensor
    columns: Tensor
    flags: Tensor
    reach: Reach

    @classmethod
    def from_mask(cls, keep: Tensor, reach: Reach, blocks: Blocks, levels: Tensor | None = None) -> BlockMap:
        """The map that keeps ``keep`` bool ``[B, M, query blocks, key blocks]`` as far as it is in reach. ``levels``
        uint8 of the same shape: log2 of how many keys of a block become one."""
        keep = keep & blocks.some
        count = keep.sum(-1, dtype=torch.int32)
        flags = (~blocks.full).to(torch.uint8).expand(keep.shape)
        if levels is not None:
            flags = flags | (levels << LEVEL_SHIFT)
        column = torch.arange(keep.shape[-1], device=keep.device, dtype=torch.int32).expand(keep.shape)
        if keep.is_cuda:  # at equal distances: the length of `columns` must not depend on the data
            order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)
            columns, flags = order.to(torch.int32).flatten(), flags.gather(-1, order).flatten()
            start = torch.arange(count.numel(), device=keep.device, dtype=torch.int32) * keep.shape[-1]
        else:
            columns, flags = column[keep], flags[keep]
            start = count.flatten().cumsum(0, dtype=torch.int32) - count.flatten()
        return cls(blocks.block_q, blocks.block_k, start.reshape(count.shape), count, columns, flags, reach)

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

    def lists(self, width: int | None = None, fill: int = -1) -> tuple[Tensor, Tensor]:
        """Columns and flags of every row ``[B, M, query blocks, width]``, ``fill`` and 0 behind a row's end. Without
        ``width`` as wide as the longest row (which makes a GPU wait)."""
        width = int(self.count.max()) if width is None else width
        place = torch.arange(width, device=self.count.device)
        real = place < self.count[..., None]
        index = torch.where(real, self.start[..., None] + place, 0)
        if not self.columns.numel():
            return torch.full_like(index, fill, dtype=torch.int32), torch.zeros_like(index, dtype=torch.uint8)
        columns = torch.where(real, self.columns[index], fill)
        return columns, torch.where(real, self.flags[index], 0)

    def dense(self) -> Tensor:
        """Which blocks are kept, bool ``[B, M, query blocks, key blocks]``."""
        columns, _ = self.lists()
        shape = (*self.count.shape, self.key_blocks + 1)
        keep = torch.zeros(shape, dtype=torch.bool, device=columns.device)
        return keep.scatter_(-1, columns.long().where(columns >= 0, shape[-1] - 1), True)[..., :-1]

    def kept(self) -> Tensor:
        """Blocks that are kept, int64 ``[M]``."""
        return self.count.sum((0, 2))

    def visible(self) -> int | Tensor:
        """Blocks that could be kept, of one mask head and all rows of the batch."""
        some = self.reach.blocks(self.block_q, self.block_k, self.count.device).some
        return some.sum() * (self.count.shape[0] // some.shape[0]) / some.shape[1]

    def density(self) -> Tensor:
        """Share of the blocks in reach that is kept, by mask head, float32 ``[M]``."""
        return self.kept() / self.visible()

    def per_head(self, heads: int) -> BlockMap:
        """The same map with a list for each of ``heads`` query heads."""
        repeats = heads // self.count.shape[1]
        if repeats == 1:
            return self
        start, count = (part.repeat_interleave(repeats, 1) for part in (self.start, self.count))
        return replace(self, start=start, count=count)

    def padded(self, width: int | None = None) -> PaddedMap:
        """The lists of a map with one block of queries."""
        if self.rows != 1:
            raise FormatError(f"A padded map has one block of queries, this map has {self.rows}.")
        index, _ = self.lists(width)
        return PaddedMap(index[:, :, 0].contiguous(), self.count[:, :, 0].contiguous(), self.block_k)

    def check(self) -> None:
        """Raise FormatError where a query that sees any key reads no block, or an entry lies out of bounds (a GPU is
        waited for)."""
        seeing = self.reach.blocks(self.block_q, self.block_k, self.count.device).some.any(-1)
        empty = ((self.count == 0) & seeing).nonzero()
        if len(empty):
            row, head, block = empty[0].tolist()
            raise FormatError(f"Query block {block} of head {head} in row {row} reads no block of keys.")
        columns, _ = self.lists()
        gaps = columns.diff(dim=-1)
        inside = torch.arange(1, columns.shape[-1], device=columns.device) < self.count[..., None]
        if bool((columns >= self.key_blocks).any()) or bool(((gaps <= 0) & inside).any()):
            raise FormatError(f"Columns of a block map must rise within a row and stay below {self.key_blocks}.")


@dataclass(frozen=True)
class PaddedMap:
    """Key blocks that the newest queries read, of fixed size so that it can be made within a CUDA graph: ``index``
    int32 ``[B, M, capacity]``, of which the first ``count`` int32 ``[B, M]`` are blocks (rising) and the others -1."""

    index: Tensor
    count: Tensor
    block_k: int
