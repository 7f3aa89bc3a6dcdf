"""The ``rarefy`` attention of Transformers: reads coded caches, and is SDPA for everything else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.source import Plain, Stored
from rarefy.core.errors import UnsupportedError
from rarefy.integrations.transformers.reach import reach_of
from rarefy.kv.attend import attend, plain_store
from rarefy.kv.rotary import Rotary
from rarefy.kv.view import Handle

NAME = "rarefy"
PLAN = "_rarefy_plan"  # attribute of attention modules: their plan and its report
HOOK = "_rarefy_plan_hook"
ANGLES, POSITIONS = "rarefy_angles", "rarefy_positions"  # arguments that attention modules pass on
# Attention module -> the state of the buffers that may hold its frequencies, and what was found among them.
_rotaries: WeakKeyDictionary[Any, tuple[list[tuple[int, int]], Rotary | None]] = WeakKeyDictionary()


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
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    angles, positions = kwargs.pop(ANGLES, None), kwargs.pop(POSITIONS, None)
    if getattr(module, PLAN, None) is not None:
        if dropout:
            raise UnsupportedError("A sparse attention plan cannot drop attention weights; set attention_dropout to 0.")
        if kwargs.get("position_bias") is not None:
            raise UnsupportedError(
                f"{type(module).__name__} adds a position bias, which a sparse plan cannot; leave its attention dense."
            )
        plan, report = getattr(module, PLAN)
        source = Stored(key.store) if isinstance(key, Handle) else Plain(key, value)
        reach = reach_of(attention_mask, query.shape[2], source.length, causal, kwargs.get("sliding_window"))
        call = Call(
            query, source, reach, scaling, module.layer_idx, softcap, angles, positions,
            _rotary_finder(module, angles, positions, source.length - query.shape[2]),
        )  # fmt: skip
        sparse = plan.attend(call, report)
        if sparse is not None:
            return sparse.transpose(1, 2).contiguous(), None
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
            scaling=scaling,
            mask=attention_mask,
            softcap=softcap,
            causal=causal,
        )
        return output.transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return output, None


def _rotary_finder(
    module: Any, angles: tuple[Tensor, Tensor] | None, positions: Tensor | None, first: int
) -> Callable[[], Rotary | None] | None:
    """What looks for the frequencies behind ``angles``, which all layers of a pass have in common."""
    if angles is None:
        return None

    def find() -> Rotary | None:
        from rarefy.integrations.transformers.kv_cache import ROTARY, rotary_of

        holders, cos = getattr(module, ROTARY, ()), angles[0]
        # To look whether frequencies give these angles makes a GPU wait, so it is done once, and when they change.
        state = [(buffer.data_ptr(), buffer._version) for holder in holders for buffer in holder.buffers(False)]
        known = _rotaries.get(module)
        if known is None or known[0] != state:
            places = torch.arange(first, first + cos.shape[1], device=cos.device)[None]
            known = state, rotary_of(holders, places if positions is None else positions, cos)
            _rotaries[module] = known
        return known[1]

    return find


def takes_more(function: Callable[..., Any]) -> bool:
    """Whether ``function`` takes arguments it does not name, which attention modules pass on."""
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values())


def pass_angles(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of attention modules: let the attention function know the rotary embedding of this pass."""
    embeddings = kwargs.get("position_embeddings")
    if getattr(module, PLAN, None) is None or not isinstance(embeddings, tuple) or len(embeddings) != 2:
        return None
    return args, {**kwargs, ANGLES: embeddings, POSITIONS: kwargs.get("position_ids")}
