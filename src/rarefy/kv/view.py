"""What a cache returns instead of tensors: something of their shape that only attention which knows it can read."""

from __future__ import annotations

from typing import Any

import torch

from rarefy.core.errors import UnsupportedError
from rarefy.kv.store import LayerStore


class Handle(torch.Tensor):
    """Keys or values of a store as one tensor ``[B, H, tokens, D]`` that does not exist.

    Model code may ask for its shape, dtype and device; every operation on it raises UnsupportedError.
    """

    store: LayerStore

    @staticmethod
    def __new__(cls, store: LayerStore, like: torch.Tensor) -> Handle:
        shape = (*like.shape[:2], store.length, like.shape[3])
        handle: Handle = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=like.dtype, device=like.device
        )
        handle.store = store
        return handle

    def __init__(self, store: LayerStore, like: torch.Tensor):
        super().__init__()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"Handle({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise UnsupportedError(
            f"'{func}' was called on a coded KV cache, which only the 'rarefy' attention reads; call "
            "model.set_attn_implementation('rarefy'), or leave the cache out for this model."
        )
