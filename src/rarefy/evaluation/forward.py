"""Running tokens through a model the way it will be used: at once, or in chunks that read a cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch

from rarefy.core.errors import OptionError
from rarefy.formats.bytes import ByteCount

# A fresh cache for a model, as its attention will read it. None: the model's own, in the dtype of its activations.
CacheFactory = Callable[[Any], Any]


@torch.inference_mode()
def forward(
    model: Any, tokens: torch.Tensor, *, cache: CacheFactory | None = None, chunk: int | None = None
) -> torch.Tensor:
    """Logits [B, T, V] of ``tokens`` (LongTensor [B, T]).

    Without ``chunk`` one pass sees every token, and a coded cache is then never read: attention within a pass is exact.
    With ``chunk`` tokens go in pieces of that size, each attending to what the cache kept of those before it. Raises
    OptionError for a ``cache`` without ``chunk``, since its measurement would say nothing about the cache.
    """
    tokens = tokens.to(model.device)
    if chunk is None:
        if cache is not None:
            raise OptionError("A cache is read only by tokens of a later chunk; give chunk= (--chunk), such as 64.")
        whole: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return whole
    past = new_cache(model, cache)
    return torch.cat([step(model, part, past) for part in tokens.split(chunk, 1)], 1)


def step(model: Any, tokens: torch.Tensor, past: Any, last: int | None = None) -> torch.Tensor:
    """Logits [B, T, V] of ``tokens`` after those in the cache ``past``, which then holds them too.

    With ``last`` only those of so many tokens at the end: in a small model the others cost as much as many layers.
    """
    given: dict[str, Any] = {cache_argument(model.forward): past}
    if last is not None and "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = last
    logits: torch.Tensor = model(input_ids=tokens.to(model.device), use_cache=True, **given).logits
    return logits if last is None else logits[:, -last:]


def cache_argument(function: Callable[..., Any]) -> str:
    """How ``function`` of Transformers calls its cache: ``cache`` from 5.24 on, ``past_key_values`` before."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def new_cache(model: Any, cache: CacheFactory | None) -> Any:
    """An empty cache for ``model``: what ``cache`` makes, or the one of Transformers that keeps all as it is."""
    if cache is not None:
        return cache(model)
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def fork(past: Any) -> Any:
    """A copy of a cache that may grow on its own: its ``fork()`` where it has one, else a deep copy."""
    own = getattr(past, "fork", None)
    return own() if callable(own) else copy.deepcopy(past)


def cache_bytes(past: Any) -> int:
    """Bytes that a cache keeps: what it says itself (``nbytes``, a number or a ByteCount, or a method that gives one),
    else those of its layers' tensors."""
    stated = getattr(past, "nbytes", None)
    if callable(stated):
        stated = stated()
    if stated is not None:
        return stated.total if isinstance(stated, ByteCount) else int(stated)
    tensors = (value for layer in past.layers for value in vars(layer).values() if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
