"""How a layer is stored, and what is known of it when that is decided."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.kv.codec import Codec


@dataclass(frozen=True)
class HeadShape:
    """Keys and values of one layer: number ``layer`` of ``layers`` that keep all tokens."""

    heads: int
    key_channels: int
    value_channels: int
    dtype: torch.dtype
    layer: int = 0
    layers: int = 1


@dataclass(frozen=True)
class LayerCodecs:
    """How one layer is stored. ``sink``: that many first tokens of each row stay exact; the last ``recent`` of each
    side do too. ``pre_rope``: keys are stored as they were before rotary position embedding."""

    keys: Codec
    values: Codec
    sink: int = 0
    recent_keys: int = 0
    recent_values: int = 0
    pre_rope: bool = False


@dataclass(frozen=True)
class KvSamples:
    """Keys and values of one layer on calibration data, ``[tokens, H, D]``, and what their errors count: squared
    gradients of the loss of the same shape, or None. Keys come without RoPE if ``pre_rope``. ``places``: the place of
    each token in its sequence, int64 ``[tokens]``."""

    keys: Tensor
    values: Tensor
    places: Tensor
    key_weight: Tensor | None = None
    value_weight: Tensor | None = None
    pre_rope: bool = False
