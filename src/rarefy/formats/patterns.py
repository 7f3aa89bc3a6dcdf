"""Which weights are stored: all, arbitrary ones, n of every m, or whole groups along the input.

A pattern turns a boolean mask of kept positions into stored positions, gathers what is kept, and checks stored
positions before a kernel trusts them. The stored forms are tabled in ``kernels/reference/patterns.py``; on disk the
positions are called ``bitmap`` or ``indices`` and ``row_ptr``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy import packing
from rarefy.core.config import StrictModel
from rarefy.core.errors import FormatError
from rarefy.formats.layout import Layout, Size, TensorLayout
from rarefy.kernels.reference import patterns as reference

# Columns of an n_m group whose subsets can be numbered: each subset is the bits of one signed 64-bit integer.
MAX_RANKED = 62


class Pattern(StrictModel, ABC):
    """A rule for which entries of a ``[rows, columns]`` weight are stored."""

    type: str

    @property
    @abstractmethod
    def name(self) -> str:
        """The pattern's name in the ops."""

    @property
    def block(self) -> list[int]:
        """The pattern's numbers in the ops."""
        return []

    @property
    def group(self) -> int | None:
        """Columns of the groups that are kept or dropped whole; None where entries are kept one by one."""
        return None

    @abstractmethod
    def kept_shape(self, rows: int, columns: int) -> tuple[int | str, ...]:
        """Shape of the kept entries; a string stands for a size that depends on the data."""

    @abstractmethod
    def layout(self, rows: int, columns: int) -> Layout:
        """The stored position tensors."""

    @abstractmethod
    def store(self, mask: Tensor) -> dict[str, Tensor]:
        """Position tensors for a mask ``[rows, columns]``. Raises FormatError when the mask breaks the pattern."""

    def check(self, tensors: dict[str, Tensor], rows: int, columns: int) -> int:
        """Raise FormatError when stored positions are out of bounds or inconsistent; return the number of kept entries
        (for group patterns: groups)."""
        return rows * columns

    def gather(self, dense: Tensor, mask: Tensor) -> Tensor:
        """The kept entries of ``dense [rows, columns]``, in the kept shape."""
        shape = self.kept_shape(*dense.shape)
        kept = dense[mask]
        return kept.reshape(dense.shape[0], -1) if len(shape) == 2 else kept

    def gather_params(self, params: Tensor, mask: Tensor) -> Tensor:
        """Parameters ``[rows, groups, ...]`` of what is kept; all of them unless whole groups are dropped."""
        return params


class Full(Pattern):
    """Every weight is stored."""

    type: Literal["full"] = "full"

    @property
    def name(self) -> str:
        return "full"

    def kept_shape(self, rows: int, columns: int) -> tuple[int | str, ...]:
        return rows, columns

    def layout(self, rows: int, columns: int) -> Layout:
        return {}

    def store(self, mask: Tensor) -> dict[str, Tensor]:
        if not mask.all():
            raise FormatError("A full pattern cannot drop weights; use a bitmap, n_m or groups pattern.")
        return {}


class Bitmap(Pattern):
    """Any set of weights, one bit per position; kept entries follow each other without row padding."""

    type: Literal["bitmap"] = "bitmap"

    @property
    def name(self) -> str:
        return "bitmap"

    def kept_shape(self, rows: int, columns: int) -> tuple[int | str, ...]:
        return ("kept",)

    def layout(self, rows: int, columns: int) -> Layout:
        return {"bitmap": TensorLayout(torch.int32, (rows, packing.words(columns)), "indices")}

    def store(self, mask: Tensor) -> dict[str, Tensor]:
        return {"bitmap": packing.pack_bitmap(mask)}

    def check(self, tensors: dict[str, Tensor], rows: int, columns: int) -> int:
        return _check_bitmap(tensors["bitmap"], columns)


class NM(Pattern):
    """``n`` of every ``m`` neighbouring columns; a short last group of ``l`` keeps ``ceil(n * l / m)``.

    ``index``: ``bitmap`` spends one bit per position for any n and m; ``rank`` numbers the subsets (2:4 in 3 bits
    per group, 4:8 in 7) where they are at most 256.
    """

    type: Literal["n_m"] = "n_m"
    n: Size = 2
    m: Size = 4
    index: Literal["bitmap", "rank"] = "bitmap"

    def model_post_init(self, context: object) -> None:
        if self.n > self.m:
            raise ValueError(f"n = {self.n} is larger than m = {self.m}")
        if self.index == "rank" and (self.m > MAX_RANKED or math.comb(self.m, self.n) > 256):
            raise ValueError(f"{self.n}:{self.m} has more than 256 subsets or {MAX_RANKED} columns; use index 'bitmap'")

    @property
    def name(self) -> str:
        return "n_m" if self.index == "bitmap" else "n_m_rank"

    @property
    def block(self) -> list[int]:
        return [self.n, self.m]

    def kept_shape(self, rows: int, columns: int) -> tuple[int | str, ...]:
        return rows, reference.kept_per_row(columns, self.n, self.m)

    def layout(self, rows: int, columns: int) -> Layout:
        if self.index == "bitmap":
            return {"bitmap": TensorLayout(torch.int32, (rows, packing.words(columns)), "indices")}
        shape = (rows, packing.words(-(-columns // self.m)), reference.rank_bits(self.n, self.m))
        return {"indices": TensorLayout(torch.int32, shape, "indices")}

    def store(self, mask: Tensor) -> dict[str, Tensor]:
        self._check_counts(mask)
        if self.index == "bitmap":
            return {"bitmap": packing.pack_bitmap(mask)}
        return {"indices": reference.pack_ranks(mask, self.n, self.m)}

    def check(self, tensors: dict[str, Tensor], rows: int, columns: int) -> int:
        if self.index == "bitmap":
            _check_bitmap(tensors["bitmap"], columns)
            self._check_counts(packing.unpack_bitmap(tensors["bitmap"], columns))
        else:
            groups, tail = -(-columns // self.m), columns % self.m
            ranks = packing.unpack_bits(tensors["indices"], reference.rank_bits(self.n, self.m), groups)
            limits = torch.full((groups,), math.comb(self.m, self.n), device=ranks.device)
            if tail:
                limits[-1] = math.comb(tail, reference.kept_of(tail, self.n, self.m))
            if (ranks.to(torch.int64) >= limits).any():
                raise FormatError(f"'indices' hold a number that names no {self.n}:{self.m} subset")
        return rows * reference.kept_per_row(columns, self.n, self.m)

    def _check_counts(self, mask: Tensor) -> None:
        columns = mask.shape[1]
        whole = columns // self.m * self.m
        wrong = (mask[:, :whole].unflatten(1, (-1, self.m)).sum(-1) != self.n).any() if whole else torch.tensor(False)
        tail = mask[:, whole:].sum(-1) != reference.kept_of(columns - whole, self.n, self.m)
        if bool(wrong) or bool(tail.any()):
            raise FormatError(f"the mask does not keep {self.n} of every {self.m} columns")


class Groups(Pattern):
    """Whole groups of ``size`` neighbouring columns of a row are kept or dropped (block-sparse rows of 1 x size).

    ``index``: ``ids`` lists the same number of groups for every row; ``csr`` and ``bitmap`` let rows differ.
    """

    type: Literal["groups"] = "groups"
    size: Size = 16
    index: Literal["ids", "csr", "bitmap"] = "ids"

    @property
    def name(self) -> str:
        return {"ids": "groups", "csr": "groups_csr", "bitmap": "groups_bitmap"}[self.index]

    @property
    def block(self) -> list[int]:
        return [self.size]

    @property
    def group(self) -> int | None:
        return self.size

    def kept_shape(self, rows: int, columns: int) -> tuple[int | str, ...]:
        return (rows, "kept") if self.index == "ids" else ("kept",)

    def layout(self, rows: int, columns: int) -> Layout:
        groups = -(-columns // self.size)
        if self.index == "bitmap":
            return {"bitmap": TensorLayout(torch.int32, (rows, packing.words(groups)), "indices")}
        if self.index == "ids":
            return {"indices": TensorLayout(torch.uint8, (rows, "groups", 2), "indices")}
        return {
            "indices": TensorLayout(torch.uint8, ("groups", 2), "indices"),
            "row_ptr": TensorLayout(torch.int32, (rows + 1,), "indices"),
        }

    def store(self, mask: Tensor) -> dict[str, Tensor]:
        kept = self._group_mask(mask)
        if self.index == "bitmap":
            return {"bitmap": packing.pack_bitmap(kept)}
        if kept.shape[1] > 1 << 16:
            raise FormatError(f"{kept.shape[1]} groups a row exceed 65536; use larger groups or index 'bitmap'.")
        counts = kept.sum(1)
        ids = packing.pack_uint16(kept.nonzero()[:, 1])
        if self.index == "csr":
            pointer = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
            return {"indices": ids, "row_ptr": pointer}
        if counts.numel() and bool((counts != counts[0]).any()):
            raise FormatError("rows keep different numbers of groups; use index 'csr' or 'bitmap'")
        return {"indices": ids.reshape(mask.shape[0], -1, 2)}

    def check(self, tensors: dict[str, Tensor], rows: int, columns: int) -> int:
        groups = -(-columns // self.size)
        if self.index == "bitmap":
            return _check_bitmap(tensors["bitmap"], groups)
        ids = packing.unpack_uint16(tensors["indices"])
        if ids.numel() and int(ids.max()) >= groups:
            raise FormatError(f"'indices' name group {int(ids.max())} of {groups}")
        if self.index == "ids":
            ascending = ids.diff(dim=1) > 0
        else:
            pointer = tensors["row_ptr"].to(torch.int64)
            check_row_pointer(pointer, ids.numel())
            ids = ids[: int(pointer[-1])]
            ascending = ids.diff() > 0
            ascending[pointer[(pointer > 0) & (pointer < ids.numel())] - 1] = True
        if not ascending.all():
            raise FormatError("'indices' of a row are not in ascending order")
        return ids.numel()

    def gather(self, dense: Tensor, mask: Tensor) -> Tensor:
        missing = -dense.shape[1] % self.size
        kept = self._group_mask(mask)
        slots = torch.nn.functional.pad(dense, (0, missing)).unflatten(1, (-1, self.size))[kept]
        return slots.reshape(dense.shape[0], -1) if self.index == "ids" else slots.flatten()

    def gather_params(self, params: Tensor, mask: Tensor) -> Tensor:
        kept = params[self._group_mask(mask)]
        return kept.reshape(params.shape[0], -1, *params.shape[2:]) if self.index == "ids" else kept

    def _group_mask(self, mask: Tensor) -> Tensor:
        missing = -mask.shape[1] % self.size
        padded = torch.cat([mask, mask[:, -1:].expand(-1, missing)], 1) if missing else mask
        blocks = padded.unflatten(1, (-1, self.size))
        kept = blocks.any(-1)
        if bool((kept != blocks.all(-1)).any()):
            raise FormatError(f"the mask keeps parts of groups of {self.size}")
        return kept


AnyPattern = Annotated[Full | Bitmap | NM | Groups, Field(discriminator="type")]


def check_row_pointer(pointer: Tensor, entries: int) -> None:
    """Raise FormatError unless ``pointer`` starts at 0, never falls and ends at or before ``entries``."""
    if int(pointer[0]) != 0 or int(pointer[-1]) > entries or bool((pointer.diff() < 0).any()):
        raise FormatError(f"'row_ptr' does not rise from 0 to at most {entries}")


def _check_bitmap(bitmap: Tensor, count: int) -> int:
    """Raise FormatError when bits beyond ``count`` are set; return the number of set bits."""
    flags = packing.unpack_bitmap(bitmap, packing.words(count) * packing.WORD)
    if bool(flags[..., count:].any()):
        raise FormatError(f"'bitmap' marks positions beyond {count}")
    return int(flags.sum())
