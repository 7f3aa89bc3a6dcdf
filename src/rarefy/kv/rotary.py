"""Rotary position embedding undone and redone, for keys that are stored as they were before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.kernels import cuda


def _turn(x: Tensor) -> Tensor:
    """``(-second half, first half)`` of the last dimension."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _kernel(x: Tensor, cos: Tensor, sin: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What undoes rotations where ``x`` is; None: torch."""
    if not x.is_cuda or torch.compiler.is_compiling() or cuda.status() != "cuda":
        return None
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, cos, sin)):
        return None
    from rarefy.kernels.cuda import unrotate

    return unrotate.unrotate if unrotate.fits(x, cos, sin) else None


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo ``x * cos + turn(x) * sin`` on the first channels, as many as ``cos`` has; float32 of the shape of ``x``.

    Scaled RoPE multiplies both factors by one number, so what is undone is a rotation and that number squared. On a GPU
    one launch does it, with the same bits.
    """
    kernel = _kernel(x, cos, sin)
    if kernel is not None:
        return kernel(x, cos, sin)
    width = cos.shape[-1]
    cos, sin = cos.float(), sin.float()
    turned, plain = x[..., :width].float(), x[..., width:].float()
    back = (turned * cos - _turn(turned) * sin) / (cos.square() + sin.square())
    return torch.cat([back, plain], -1) if plain.shape[-1] else back


@dataclass(frozen=True)
class Rotary:
    """Angles of every position: ``position * inv_freq``, and ``factor`` by which scaled RoPE lengthens keys."""

    inv_freq: Tensor  # float32 [half of the rotated channels]
    factor: float = 1.0

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``cos`` and ``sin``, float32 ``[..., rotated channels]``, of ``positions [...]``."""
        half = positions.unsqueeze(-1).float() * self.inv_freq.to(positions.device)
        whole = torch.cat([half, half], -1)
        return whole.cos() * self.factor, whole.sin() * self.factor

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x [B, H, n, D]`` at ``positions [B, n]``, float32."""
        cos, sin = (part.unsqueeze(1) for part in self.angles(positions))
        width = cos.shape[-1]
        turned, plain = x[..., :width].float(), x[..., width:].float()
        # The minus of `_turn` goes to the few angles, so that of many numbers only halves change places.
        low, high = sin.chunk(2, -1)
        turned = torch.addcmul(turned * cos, turned.roll(width // 2, -1), torch.cat([-low, high], -1))
        return torch.cat([turned, plain], -1) if plain.shape[-1] else turned
