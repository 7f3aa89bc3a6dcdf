"""Value tables of the float code formats, exact in float32, indexed by code.

Sources: OCP Microscaling specification 1.0 (FP4 E2M1, FP6 E2M3), OCP FP8 1.0 (E4M3, E5M2), and the normal-float
table of QLoRA (Dettmers et al. 2023, appendix E). Codes that the specifications call NaN or infinity are never
written; they read as the largest finite value, so that no stored code can decode to a non-finite weight.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_NF3 = (
    -1.0, -0.5350227355957031, -0.2469314038753510, 0.0,
    0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0,
)  # fmt: skip

# name -> number of bits
FORMATS = {"fp3": 3, "fp4": 4, "nf3": 3, "nf4": 4, "fp6_e2m3": 6, "fp8_e4m3": 8, "fp8_e5m2": 8}


@functools.lru_cache(maxsize=64)
def table(name: str, device: torch.device | str = "cpu") -> Tensor:
    """The values of format ``name``, float32 ``[2**bits]``."""
    with torch.device("cpu"):  # not where a caller is building a model without storage: the table is kept
        values = _build(name)
    return values.to(device)


def _build(name: str) -> Tensor:
    if name == "nf4":
        return torch.tensor(_NF4)
    if name == "nf3":
        return torch.tensor(_NF3)
    if name == "fp3":
        half = torch.tensor([0.0, 1.0, 2.0, 4.0])
        return torch.cat([half, -half])
    if name == "fp4":
        half = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        return torch.cat([half, -half])
    codes = torch.arange(64 if name == "fp6_e2m3" else 256, dtype=torch.int32)
    exponent_bits, mantissa_bits, bias, largest = {
        "fp6_e2m3": (2, 3, 1, 7.5), "fp8_e4m3": (4, 3, 7, 448.0), "fp8_e5m2": (5, 2, 15, 57344.0),
    }[name]  # fmt: skip
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = (codes & ((1 << mantissa_bits) - 1)).float() / (1 << mantissa_bits)
    normal = torch.where(exponent > 0, 1.0, 0.0)
    magnitude = (normal + fraction) * torch.exp2(torch.clamp(exponent, min=1).float() - bias)
    sign = 1.0 - 2.0 * (codes >> (exponent_bits + mantissa_bits)).float()
    return sign * torch.clamp(magnitude, max=largest)
