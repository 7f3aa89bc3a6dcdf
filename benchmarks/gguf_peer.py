"""A Llama's weights as llama.cpp reads them: written as F16 GGUF, then quantized by llama.cpp's own quantizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rarefy.sources.demo import GGUF_NAME, GGUF_SHA256, PACKAGE
from rarefy.sources.gguf_header import read_gguf
from rarefy.sources.packaged import packaged_file

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_f16(folder: Path, out: Path) -> None:
    """The demo model in ``folder`` as GGUF: matrices in F16, norms in F32, metadata of the packaged file."""
    import gguf

    packaged = packaged_file(PACKAGE, GGUF_NAME, GGUF_SHA256)
    reader = gguf.GGUFReader(packaged)
    writer = gguf.GGUFWriter(str(out), "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, inner = field.types[0], field.types[-1]
        writer.add_key_value(name, field.contents(), kind, inner if kind == gguf.GGUFValueType.ARRAY else None)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    fields = read_gguf(packaged).fields
    _write(writer, folder, fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"])


def write_f16_without_words(folder: Path, out: Path) -> None:
    """The Llama in ``folder`` as GGUF without a tokenizer: llama.cpp quantizes it and runs it on numbered tokens."""
    import gguf

    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    _write(writer, folder, heads, kv_heads)


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp keeps them: it turns neighbouring channels where Transformers
    turns halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Inverse of ``paired``."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _write(writer: Any, folder: Path, heads: int, kv_heads: int) -> None:
    counts = {"attn_q": heads, "attn_k": kv_heads}
    weights: dict[str, torch.Tensor] = {}
    for part in sorted(folder.glob("*.safetensors")):
        weights |= load_file(part)
    for name, weight in weights.items():
        stored = stored_name(name)
        if (count := counts.get(stored.split(".")[-2])) is not None:
            weight = paired(weight, count)
        weight = weight.float() if weight.dim() == 1 else weight.half()
        writer.add_tensor(stored, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, kind: str) -> None:
    """``source`` quantized by llama.cpp to ``kind``, such as Q4_0."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = torch.get_num_threads()
    part = out.with_suffix(".part")  # what was interrupted is not taken for a model
    if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), parameters):
        raise SystemExit(f"llama.cpp could not quantize '{source}' to {kind}.")
    part.replace(out)


def stored_name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
