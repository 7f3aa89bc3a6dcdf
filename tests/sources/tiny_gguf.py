"""Random tiny models written as GGUF files the way converters write them, for tests to read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "l d", "or ld", "Ġw orld", "1 2"]
USER_DEFINED = "<think>"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# Transformers' short names -> GGUF's.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def vocabulary() -> list[str]:
    merged = [merge.replace(" ", "") for merge in WORDS]
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merged, USER_DEFINED]


def tiny_model(model_type: str, **options: Any) -> PreTrainedModel:
    """A float32 model of two layers, four query and two key heads of 16, with every parameter random."""
    config = AutoConfig.for_model(
        model_type,
        **{
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(vocabulary()), "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        }
        | options,
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 * torch.randn_like(parameter)
            parameter.copy_(1 + spread if "norm" in name else spread)
    return model


def write_gguf(
    path: Path, model: PreTrainedModel, quantization: str = "F32", fields: dict[str, Any] | None = None
) -> None:
    """Write ``model`` with byte-level tokens; ``fields`` replaces or (None) drops metadata, by their full keys."""
    config, arch = model.config, model.config.model_type
    facts: dict[str, Any] = {
        "general.name": "Tiny", "general.license": "mit",
        f"{arch}.block_count": config.num_hidden_layers, f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size, f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_dim, f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2" if arch.startswith("qwen") else "smollm",
        "tokenizer.ggml.tokens": vocabulary(), "tokenizer.ggml.merges": WORDS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL) - 1) + [4],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.chat_template": TEMPLATE,
    } | (fields or {})
    writer = gguf.GGUFWriter(path, facts.pop("general.architecture", arch))
    for key, value in facts.items():
        _add(writer, key, value)
    for name, tensor in stored_tensors(model).items():
        # Converters keep vectors in float32 whatever the matrices are.
        kind = gguf.GGMLQuantizationType[quantization if tensor.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        adders[type(value)](key, value)


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters under their GGUF names; for Llama with the rows of q and k interleaved."""
    config, out = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, kind = name.rpartition(".")
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            stored = f"blk.{layer}.{NAMES[module]}"
        else:
            stored = NAMES[module]
        if config.model_type == "llama" and stored.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if stored.endswith("q") else config.num_key_value_heads
            tensor = interleave(tensor, heads)
        out[f"{stored}.{kind}"] = tensor.detach().contiguous()
    if config.rope_parameters["rope_type"] == "llama3":
        out["rope_freqs.weight"] = rope_divisors(model)
    return out


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Within each head, rows 0, d/2, 1, d/2 + 1, ...: what interleaved rotary embedding reads."""
    head_dim = tensor.shape[0] // heads
    order = torch.arange(head_dim).reshape(2, -1).T.flatten()
    rows = torch.cat([head * head_dim + order for head in range(heads)])
    return tensor[rows]


def rope_divisors(model: PreTrainedModel) -> torch.Tensor:
    theta, head_dim = model.config.rope_parameters["rope_theta"], model.config.head_dim
    plain = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    return (plain / model.model.rotary_emb.inv_freq.double()).float()
