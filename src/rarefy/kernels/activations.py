"""Activations in 8 bits: ``rarefy::quantize_tokens``, on processors in torch and on GPUs by one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0  # of E4M3
SMALLEST = 1e-12  # a token of zeros keeps a step that can be divided by

library = torch.library.Library("rarefy", "FRAGMENT")


def quantize_tokens(x: Tensor, gain: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """``x [tokens, columns]`` as float8 E4M3 of that shape and the step of each token, float32 ``[tokens]``.

    The largest number of a token becomes 448. With ``gain [columns]`` tokens are first divided by the root of their
    mean square plus ``eps`` and multiplied by it, as an RMSNorm does.
    """
    return torch.ops.rarefy.quantize_tokens(x, gain, eps)  # type: ignore[no-any-return]


def reference(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``quantize_tokens`` in torch."""
    values = x.float()
    if gain is not None:
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * gain.float()
    step = values.abs().amax(-1).clamp(min=SMALLEST) / LARGEST
    return (values / step.unsqueeze(-1)).to(torch.float8_e4m3fn), step


def _fake(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], dtype=torch.float32)


library.define("quantize_tokens(Tensor x, Tensor? gain, float eps) -> (Tensor, Tensor)")
library.impl("quantize_tokens", reference, "CompositeExplicitAutograd")
torch.library.register_fake("rarefy::quantize_tokens", _fake, lib=library)
