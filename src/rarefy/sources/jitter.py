"""Function-preserving jitter: move every weight off the grid it was quantized on, and keep what the model computes.

Weights read from a 4-bit file lie exactly on a 4-bit grid, so that a quantizer with the same grid would look free of
error. Scaling channels by random positive factors, undone where the channel is read, breaks the grid and leaves the
logits alone up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rarefy.core.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def jitter(
    state: Mapping[str, torch.Tensor], *, layers: int, heads: int, kv_heads: int, sigma: float, seed: int
) -> dict[str, torch.Tensor]:
    """A copy of ``state`` with jittered weights; tensors that do not change are shared with the input.

    ``state`` has the names, shapes and gated feed-forward of Llama in Transformers (``model.layers.<n>. ...``), any
    floating dtype; each tensor is scaled in float32 and keeps its dtype. In every layer each channel draws
    ``s = exp(sigma * N(0, 1))`` for four pairs: the gain of the input norm and the columns of q, k, v; the gain of
    the second norm and the columns of gate and up; the rows of up and the columns of down; the rows of v and the
    columns of o, the same ``s`` for all query heads that share a value head.

    The draws depend on ``seed`` alone, the same on every machine. Raises UnsupportedError naming a missing tensor.
    """
    import numpy as np
    import torch

    out = dict(state)
    random = np.random.RandomState(seed)  # its stream never changes between releases of NumPy

    def draw(count: int) -> torch.Tensor:
        return torch.from_numpy(np.exp(sigma * random.standard_normal(count)).astype(np.float32))

    def scale(name: str, factors: torch.Tensor, optional: bool = False) -> None:
        if name not in out:
            if optional:
                return
            raise UnsupportedError(f"The model has no tensor '{name}', so it cannot be jittered; use jitter=0.")
        tensor = out[name]
        out[name] = (tensor.float() * factors.to(tensor.device)).to(tensor.dtype)

    def rows(module: str, factors: torch.Tensor) -> None:
        scale(f"{module}.weight", factors[:, None])
        scale(f"{module}.bias", factors, optional=True)

    def extent(name: str, axis: int) -> int:
        if name not in out:
            raise UnsupportedError(f"The model has no tensor '{name}', so it cannot be jittered; use jitter=0.")
        return out[name].shape[axis]

    for layer in range(layers):
        at = f"model.layers.{layer}"
        s = draw(extent(f"{at}.input_layernorm.weight", 0))
        scale(f"{at}.input_layernorm.weight", s)
        for module in QKV:
            scale(f"{at}.{module}.weight", 1 / s)

        s = draw(extent(f"{at}.post_attention_layernorm.weight", 0))
        scale(f"{at}.post_attention_layernorm.weight", s)
        scale(f"{at}.mlp.gate_proj.weight", 1 / s)
        scale(f"{at}.mlp.up_proj.weight", 1 / s)

        s = draw(extent(f"{at}.mlp.up_proj.weight", 0))
        rows(f"{at}.mlp.up_proj", 1 / s)
        scale(f"{at}.mlp.down_proj.weight", s)

        s = draw(extent(f"{at}.self_attn.v_proj.weight", 0))
        rows(f"{at}.self_attn.v_proj", 1 / s)
        shared = s.reshape(kv_heads, -1).repeat_interleave(heads // kv_heads, dim=0).flatten()
        scale(f"{at}.self_attn.o_proj.weight", shared)
    return out
