"""Llamas of a given shape with random weights, for speed where no such model is at hand: as Transformers, rarefy and
llama.cpp read them, from the same numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf_peer
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rarefy
from rarefy.contracts import Recipe, Rule

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
# What the layers are stored in, and llama.cpp's type of that size; the head is 4 bits in groups of 32 in all.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "int4 g64": ({"num_bits": 4, "group_size": 64}, "Q4_0"),
    "ternary g128": ({"format": "ternary", "group_size": 128}, "TQ2_0"),
    "int2 g128": ({"num_bits": 2, "group_size": 128}, "TQ2_0"),
    "binary g128": ({"format": "binary", "group_size": 128}, "Q1_0"),
}


def dense(shape: str, work: Path, **others: int) -> Path:
    """The folder of a dense model in bfloat16, made once; ``others`` of its configuration are named in its name."""
    folder = work / "-".join([shape, *(f"{name}-{value}" for name, value in others.items())])
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(LlamaConfig(**{**SHAPES[shape], **others}))
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        model.tie_weights()
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        for weight in model.parameters():
            if weight.dim() == 1:
                torch.nn.init.ones_(weight)
            else:
                torch.nn.init.normal_(weight, std=0.02)
        model.save_pretrained(folder)
    return folder


def compressed(shape: str, kind: str, work: Path) -> Any:
    """The model with its layers in ``kind``: one layer is rounded to nearest, once, and the others are copies of it,
    which lie apart in memory and cost what others would."""
    folder = work / f"{shape}-{kind.replace(' ', '-')}-one"
    if not (folder / "config.json").is_file():
        head = Rule(targets=("lm_head",), method="rtn", options={"num_bits": 4, "group_size": 32})
        recipe = Recipe(name="rtn", rules=(head, Rule(method="rtn", options=KINDS[kind][0])))
        rarefy.compress(dense(shape, work, num_hidden_layers=1), recipe, out=folder, overwrite=True)
    model: Any = rarefy.load(folder)
    model.config.num_hidden_layers = SHAPES[shape]["num_hidden_layers"]
    for index in range(1, model.config.num_hidden_layers):
        layer = copy.deepcopy(model.model.layers[0])
        layer.self_attn.layer_idx = index
        model.model.layers.append(layer)
    return model


def llama_cpp_file(shape: str, kind: str, work: Path) -> Path | None:
    """The model as llama.cpp quantizes it to the type that goes with ``kind``, made once; None if it has no such."""
    import llama_cpp

    name = KINDS[kind][1]
    out = work / f"{shape}-{name.lower()}.gguf"
    if not hasattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"):
        return None
    if not out.is_file():
        whole = work / f"{shape}-f16.gguf"
        if not whole.is_file():
            gguf_peer.write_f16_without_words(dense(shape, work), whole.with_suffix(".part"))
            whole.with_suffix(".part").replace(whole)
        gguf_peer.quantize(whole, out, name)
    return out
