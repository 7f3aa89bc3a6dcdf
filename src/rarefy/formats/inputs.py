"""What a term multiplies: the layer's input as it is, permuted, scaled or rotated.

``transform`` maps ``x [..., columns]`` to the term's own input, ``fold`` maps a weight on that input back to a weight
on ``x``: ``transform(x) @ w.T == x @ fold(w).T``.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy import packing
from rarefy.core.config import StrictModel
from rarefy.core.errors import FormatError
from rarefy.formats.layout import FLOATS, FloatName, Layout, TensorLayout


class RawInput(StrictModel):
    """The layer's input itself."""

    type: Literal["raw"] = "raw"

    def layout(self, columns: int) -> Layout:
        return {}

    def check(self, tensors: dict[str, Tensor], columns: int) -> None:
        """Nothing is stored, nothing can be wrong."""

    def transform(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return x

    def fold(self, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return weight


class PermutedInput(StrictModel):
    """``x[..., permutation]``: columns in another order, such as an activation order."""

    type: Literal["permuted"] = "permuted"

    def layout(self, columns: int) -> Layout:
        return {"permutation": TensorLayout(torch.int32, (columns,), "transform")}

    def check(self, tensors: dict[str, Tensor], columns: int) -> None:
        order = tensors["permutation"].to(torch.int64).sort().values
        if not torch.equal(order, torch.arange(columns, device=order.device)):
            raise FormatError("'permutation' does not name every column once")

    def transform(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return x.index_select(-1, tensors["permutation"])

    def fold(self, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return torch.empty_like(weight).index_copy_(-1, tensors["permutation"].to(torch.int64), weight)


class ScaledInput(StrictModel):
    """``x * input_scale``: a factor per column that could not be folded into the layer before."""

    type: Literal["scaled"] = "scaled"
    dtype: FloatName = "float32"

    def layout(self, columns: int) -> Layout:
        return {"input_scale": TensorLayout(FLOATS[self.dtype], (columns,), "transform")}

    def check(self, tensors: dict[str, Tensor], columns: int) -> None:
        if not torch.isfinite(tensors["input_scale"]).all():
            raise FormatError("'input_scale' holds NaN or infinity")

    def transform(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        # Types promote first: a 32-bit factor may lie outside the range of 16-bit floats where the product does not.
        return (x * tensors["input_scale"]).to(x.dtype)

    def fold(self, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return weight * tensors["input_scale"].to(weight.dtype)


class RotatedInput(StrictModel):
    """``hadamard(signs * x)`` in blocks of the largest power of two that divides the width (orthonormal)."""

    type: Literal["rotated"] = "rotated"

    def layout(self, columns: int) -> Layout:
        return {"signs": TensorLayout(torch.int32, (packing.words(columns),), "transform")}

    def check(self, tensors: dict[str, Tensor], columns: int) -> None:
        beyond = packing.unpack_bitmap(tensors["signs"], packing.words(columns) * packing.WORD)[columns:]
        if bool(beyond.any()):
            raise FormatError(f"'signs' mark columns beyond {columns}")

    def transform(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return hadamard(x * self._signs(x, tensors))

    def fold(self, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return hadamard(weight) * self._signs(weight, tensors)

    def _signs(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return 1 - 2 * packing.unpack_bitmap(tensors["signs"], x.shape[-1]).to(x.dtype)


AnyInput = Annotated[RawInput | PermutedInput | ScaledInput | RotatedInput, Field(discriminator="type")]


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of ``x [..., n]`` in blocks of the largest power of two dividing ``n``.

    The transform is symmetric and its own inverse. Sums are taken in 32 bits or more, since those of ``n`` 16-bit
    numbers can overflow before they are scaled down.
    """
    size = x.shape[-1] & -x.shape[-1]
    blocks = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, size))
    half = 1
    while half < size:
        pairs = blocks.unflatten(-1, (-1, 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        blocks = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return (blocks * size**-0.5).flatten(-2).to(x.dtype)
