"""The CUDA kernel that undoes RoPE, run by this processor, gives the bits of torch's operations."""

from __future__ import annotations

import pytest
import torch

from rarefy.kernels.cuda import unrotate as kernel
from rarefy.kv.rotary import Rotary, unrotate
from tests.kernels.cuda.emulation import COMPILER, unrotated

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.mark.parametrize(
    ("width", "channels", "dtype", "angles", "rows"),
    [(128, 128, torch.bfloat16, torch.float32, 2), (32, 64, torch.float16, torch.bfloat16, 1),
     (64, 64, torch.float32, torch.float32, 1)],
)  # fmt: skip
def test_bits_are_those_of_torch(
    width: int, channels: int, dtype: torch.dtype, angles: torch.dtype, rows: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 37, channels).to(dtype)[:, :, 4:]  # heads are further apart than their tokens need
    positions = torch.arange(33) + 1000 * torch.arange(rows)[:, None]
    rotary = Rotary(10000 ** -(torch.arange(width // 2) / (width // 2)), 1.3)
    cos, sin = (part[:, None].to(angles) for part in rotary.angles(positions))
    assert torch.equal(unrotated(x, cos, sin), unrotate(x, cos, sin))


def test_what_does_not_fit_is_told() -> None:
    x, angles = torch.randn(2, 3, 8, 64), torch.randn(1, 1, 8, 64)
    assert kernel.fits(x, angles, angles)
    assert not kernel.fits(x[..., 1:], angles, angles) and not kernel.fits(x, angles[:, :, 1:], angles[:, :, 1:])
    assert not kernel.fits(x, angles[..., :60], angles[..., :60]) and not kernel.fits(x[0], angles, angles)
    assert not kernel.fits(x.double(), angles, angles) and not kernel.fits(x, angles, angles.half())
