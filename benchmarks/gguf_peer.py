"""A Llama's weights as llama.cpp reads them: written as F16 GGUF, then quantized by llama.cpp's own quantizer."""

from __future__ import annotations

from pathlib import Path

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
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights: dict[str, torch.Tensor] = {}
    for part in sorted(folder.glob("*.safetensors")):
        weights |= load_file(part)
    for name, weight in weights.items():
        stored = _name(name)
        if (count := heads.get(stored.split(".")[-2])) is not None:
            # llama.cpp turns neighbouring channels where Transformers turns halves.
            weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
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
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), parameters):
        raise SystemExit(f"llama.cpp could not quantize '{source}' to {kind}.")


def _name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
