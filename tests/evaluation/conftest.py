"""Tiny random models whose predictions are far from uniform, so that a wrong metric shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 97


@pytest.fixture
def tiny() -> Callable[..., LlamaForCausalLM]:
    def build(seed: int = 0, vocab: int = VOCAB, **options: object) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.4,
            **options,
        )
        return LlamaForCausalLM(config).eval()

    return build


@pytest.fixture
def near(tiny: Callable[..., LlamaForCausalLM]) -> Callable[..., LlamaForCausalLM]:
    """A model whose weights are those of ``tiny()`` with a little noise: a stand-in for a compressed one."""

    def build(seed: int = 1, noise: float = 0.05) -> LlamaForCausalLM:
        model = tiny()
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight += noise * weight.std() * torch.randn_like(weight)
        return model

    return build


@pytest.fixture
def windows() -> torch.Tensor:
    """Five windows of 24 tokens."""
    return torch.randint(VOCAB, (5, 24), generator=torch.Generator().manual_seed(7))
