"""What a GPU's kernels are compiled for on the side of the weight: how its codes, scales and zeros are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from rarefy.kernels.cuda.layout import TILE, Order, step_of


@dataclass(frozen=True)
class Code:
    """What is stored. ``group``: columns of a scale, 0 for the whole row; ``table``: codes are looked up in a table of
    16-bit numbers, one that all rows share or one of each row; ``scale``, ``zero``: their types, or that a "scale"
    holds the values of two codes (``pairs``), or codes of 4 bits of a scale and a zero (``bilevel``) or of a scale only
    (``level``), whose numbers of second order are those of ``second_groups`` groups; without a zero, ``center`` is the
    code that means zero. ``outliers``: the type of single values that are added to the weight. ``float8``: codes of 8
    bits are numbers in E4M3. ``ragged``: columns do not fill the last step. ``held``: how many activations of a
    token wait in shared memory for outliers, of which there are about so many ``quads`` (see ``layout.quads_of``)."""

    bits: int
    group: int = 0
    span: int = 8
    table: Literal["", "shared", "rows"] = ""
    scale: torch.dtype | Literal["pairs", "bilevel", "level"] | None = torch.float16
    zero: torch.dtype | None = None
    center: int = 0
    outliers: torch.dtype | None = None
    float8: bool = False
    second_groups: int = 1
    ragged: bool = True
    held: int = 0
    quads: int = 0

    MOST_HELD: ClassVar[int] = 16384

    def with_outliers(self, dtype: torch.dtype, columns: int, quads: int) -> Code:
        """With values of ``dtype`` beside these of a weight of so many ``columns``, in so many ``quads``."""
        held = min(self.MOST_HELD, -(-columns // 1024) * 1024)
        known = -(-quads // 4) * 4 if quads <= 16 else 1 << (quads - 1).bit_length()  # few forms for all numbers
        return replace(self, outliers=dtype, held=held, quads=known)

    @property
    def order(self) -> Order:
        """How codes lie in their words."""
        return {"": "halves", "shared": "pairs", "rows": "nibbles"}[self.table]  # type: ignore[return-value]

    @property
    def step(self) -> int:
        """Columns that a warp takes at once."""
        return step_of(self.bits)

    @property
    def parts(self) -> int:
        """Groups of a step."""
        return self.step // self.group if 0 < self.group < self.step else 1

    @property
    def bytes_of_step(self) -> int:
        """Of a tile's codes, scales and zeros, as ``prompt.cu`` keeps them for its lanes."""
        words = {None: 0, torch.float32: 2, "pairs": 2, "bilevel": 3, "level": 3}
        pairs = -(-self.parts // 4) * (words.get(self.scale, 1) + words.get(self.zero, 1))
        return self.step * self.bits * 2 + 128 * pairs

    @property
    def shares_scales(self) -> bool:
        """Whether groups are so small that lanes form each other's scales, where there are several tokens."""
        return self.parts > 4 and self.scale not in (None, "pairs")

    @property
    def table_bytes(self) -> int:
        """Shared memory of a table: each lane has a bank to itself."""
        return 32 * 4 << 2 * self.bits if self.table == "shared" else 0

    @property
    def can_rescale(self) -> bool:
        """Whether sums can be kept in units of the last scale: ratios of 16-bit floats neither vanish nor overflow."""
        return not self.sums and (self.group == 0 or self.scale == torch.float16)

    @property
    def steps_of_warp(self) -> int:
        """Steps that a warp dequantizes."""
        return 1 if self.parts > 4 else 4

    @property
    def plain_numbers(self) -> bool:
        """Whether codes are integers, which are not looked up."""
        return not self.table and not self.float8

    def tile_bytes(self, columns: int, split: int, quads: int) -> int:
        """Bytes of 16 rows of so many ``columns`` (of a share of ``split``) with so many ``quads`` of outliers."""
        sizes = {"pairs": 4, "bilevel": 1, "level": 1, None: 0}
        kinds = (self.scale, self.zero)
        numbers = sum(each.itemsize if isinstance(each, torch.dtype) else sizes[each] for each in kinds)
        steps = math.ceil(columns / (self.step * split))
        groups = -(-steps * self.step // self.group) + (split > 1) if self.group else 1
        second = 8 * -(-groups // self.second_groups) if self.scale in ("bilevel", "level") else 0
        return steps * self.step * TILE * self.bits // 8 + TILE * numbers * groups + second + 256 * quads

    def can_be_stored(self, columns: int, split: int) -> bool:
        """Whether bulk copies bring such a tile: in whole 16 bytes."""
        groups = -(-columns // self.group) if self.group else 1
        second = self.scale in ("bilevel", "level")
        return self.span != 16 and not (second and (split > 1 or -(-groups // self.second_groups) % 2))

    @property
    def fits_planes(self) -> bool:
        """Whether tensor cores can multiply its bits by those of one token (``planes.cuh``)."""
        return self.bits == 1 and not self.table and self.group % 128 == 0

    @property
    def sums(self) -> bool:
        """Whether sums of activations are wanted beside the product."""
        return self.zero is not None or self.scale in ("pairs", "bilevel")
