"""Tiny models of every family the runner knows, with numbers in every parameter so that none can be mislaid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rarefy
from rarefy.contracts import Recipe, Rule
from tests.zoo import _GROUPED, VOCABULARY, Family, family_of

DECODERS = {
    name: family_of(name) for name in ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")
} | {"gemma": Family("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "tie_word_embeddings": True})}


def build_model(family: str, **changes: Any) -> Any:
    """A model whose norms, biases and weights are all drawn, large enough that every part shows in the logits."""
    # Gemma 2 caps its scores, which only 'eager' does.
    model = DECODERS[family].build(**{"attn_implementation": "eager" if family == "gemma2" else "sdpa", **changes})
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        spread = 0.3 if parameter.dim() == 1 else 2.0 / parameter.shape[-1] ** 0.5
        parameter.data += spread * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def compress(model: Any, *targets: str, **options: Any) -> Any:
    """``model`` with its linear layers and ``targets`` in groups of 4 bits."""
    rule = Rule(targets=("Linear", *targets), method="rtn", options={"num_bits": 4, "group_size": 16, **options})
    rarefy.compress(model, Recipe(name="rtn", rules=(rule,)))
    return model


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
