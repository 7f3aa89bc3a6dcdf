"""Tiny models of every family the runner knows, with numbers in every parameter so that none can be mislaid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rarefy
from rarefy.contracts import Recipe, Rule
from rarefy.formats.grids import BinaryGrid, Grid, IntegerGrid, LutGrid
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms import Quantized, Residual
from rarefy.layers.linear import CompressedLinear
from tests.zoo import _GROUPED, VOCABULARY, Family, family_of

DECODERS = {
    name: family_of(name) for name in ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")
} | {"gemma": Family("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "tie_word_embeddings": True})}

# Grids, and whether outliers lie beside them.
CODED: dict[str, tuple[Grid, bool]] = {
    "int4": (IntegerGrid(num_bits=4, group_size=64), False),
    "int4 in short groups": (IntegerGrid(num_bits=4, group_size=16, zero="integer"), True),
    "int3 with zeros": (IntegerGrid(num_bits=3, group_size=64, zero="float"), True),
    "two-level scales": (IntegerGrid(num_bits=3, group_size=16, zero="float", scales=BilevelScale(rows=16)), True),
    "tables of rows": (LutGrid(num_bits=3), True),
    "tables of 16": (LutGrid(num_bits=4, group_size=32), False),
    "binary": (BinaryGrid(group_size=128), False),
    "int2 in rows": (IntegerGrid(num_bits=2), False),
    "int8": (IntegerGrid(num_bits=8, group_size=32), False),
}  # fmt: skip


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


def coded(name: str, sizes: dict[str, Any]) -> Any:
    """A Llama of ``sizes`` with random weights, all of its linear layers, the head too, in one of `CODED`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    grid, with_outliers = CODED[name]
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            params = grid.fit(weight)
            terms: list[Any] = [Quantized.from_codes(grid.encode(weight, params), params, grid)]
            if with_outliers:
                left = weight - terms[0].decode()
                terms.append(Residual.from_weight(left, left.abs() > 2 * left.std()))
            model.set_submodule(path, CompressedLinear(terms))
    return model


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
