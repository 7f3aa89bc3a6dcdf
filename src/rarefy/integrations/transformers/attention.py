"""The ``rarefy`` attention of Transformers: reads coded caches, and is SDPA for everything else."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rarefy.core.errors import UnsupportedError
from rarefy.kv.attend import attend, plain_store
from rarefy.kv.view import Handle

NAME = "rarefy"


def register_attention() -> None:
    """Make ``attn_implementation="rarefy"`` known, with the masks it wants. Safe to call twice."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, rarefy_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def rarefy_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query [B, Hq, Q, D]``, as Transformers calls it: result ``[B, Q, Hq, D]`` and no weights."""
    softcap = kwargs.get("softcap")
    if kwargs.get("s_aux") is not None:
        raise UnsupportedError(
            f"{type(module).__name__} adds learned sinks (s_aux) to attention, which rarefy does not; use 'eager'."
        )
    store = None
    if isinstance(key, Handle):
        if kwargs.get("position_bias") is not None:
            raise UnsupportedError(
                f"{type(module).__name__} adds a position bias, which a coded cache cannot; use the dense cache."
            )
        store = key.store
        assert store.keys is not None and store.values is not None
        if not store.keys.coded and not store.values.coded:
            key, value, store = store.keys.tail, store.values.tail, None
    if store is not None or softcap is not None:
        output = attend(
            plain_store(key, value) if store is None else store,
            query,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            mask=attention_mask,
            softcap=softcap,
            causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        )
        return output.transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return output, None
