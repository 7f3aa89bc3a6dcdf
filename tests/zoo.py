"""Tiny random models of many families, each with inputs that reach all of its layers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 96
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Family:
    """How to build one tiny model: its class, its configuration's class and values, and what it eats."""

    model: str
    config: str
    values: dict[str, Any]
    eats: str = "tokens"

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.model)

    def build(self, seed: int = 0, **changes: Any) -> Any:
        """A fresh model in float32 and evaluation mode."""
        config = getattr(transformers, self.config)(**{**self.values, **changes})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model_class(config).eval()

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        if self.eats == "pixels":
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
        tokens = torch.randint(3, VOCABULARY, (2, 14), generator=generator)
        if self.eats == "pairs":
            return {"input_ids": tokens, "decoder_input_ids": tokens[:, :9]}
        return {"input_ids": tokens}


_BERT = {**_TEXT, "pad_token_id": 0}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "llama_tied": Family("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_GROUPED, "moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "tie_word_embeddings": True, "sliding_window": 8}
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {**{k: v for k, v in _TEXT.items() if k != "intermediate_size"}, "ffn_dim": 80, "word_embed_proj_dim": 48},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "bert_lm": Family("BertForMaskedLM", "BertConfig", _BERT),
    "bert_labels": Family("BertForSequenceClassification", "BertConfig", {**_BERT, "num_labels": 3}),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 8, "num_labels": 5,
        },
        eats="pixels",
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4,
            "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
        },
        eats="pairs",
    ),
}  # fmt: skip
# Families that differ from those above where they are calibrated: biases of q, k and v, norms around both halves of a
# block, another order of masks, decoders that take positions beside the hidden state.
RELATIVES = {
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", {k: v for k, v in _GROUPED.items() if k != "head_dim"}),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 8}),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "sliding_window": 8}),
    "neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    "phi": Family("PhiForCausalLM", "PhiConfig", _BERT),  # oldest Transformers: no padding token of its own
    "bert_features": Family("BertModel", "BertConfig", _BERT),
}


def family_of(name: str) -> Family:
    return FAMILIES[name] if name in FAMILIES else RELATIVES[name]


def dense_folder(family: str, folder: Path, **changes: Any) -> Any:
    """Build a model, save it to ``folder`` as anybody would, and return it."""
    model = family_of(family).build(**changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    """The model's output for the family's inputs."""
    return model(**family_of(family).inputs()).logits


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every stored tensor of a model folder by name; a name stored twice is an error."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = load_file(path)
        assert not found.keys() & loaded.keys()
        found.update(loaded)
    return found


def same_bytes(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors agree in names, dtypes, shapes and every bit (NaN included)."""

    def raw(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(raw(left[name]), raw(right[name]))
        for name in left
    )


def tiny_tokenizer() -> Any:
    """A tokenizer of one token per byte class, built here, with end-of-text and padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<unk>", "<pad>", "</s>", *letters, *(first + second for first in letters[:8] for second in letters[:8])]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert len(words) <= VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=64
    )
