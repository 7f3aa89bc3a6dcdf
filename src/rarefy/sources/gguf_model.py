"""What a GGUF file's metadata and tensor names mean in Transformers: the configuration and the list of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rarefy.core.errors import SourceError, UnsupportedError
from rarefy.sources.gguf_header import GgufFile


@dataclass(frozen=True)
class Architecture:
    """One GGUF architecture. ``permuted``: rows of q and k are stored for interleaved rotary embedding."""

    model_type: str
    model_class: str
    permuted: bool = False
    head_norms: bool = False
    # Linear layers with a bias: always, or (None) all of them or none, stated by a switch in the configuration.
    biased: frozenset[str] | None = frozenset()


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True, biased=None),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", biased=frozenset({"attn_q", "attn_k", "attn_v"})),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", head_norms=True),
}
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")
ROPE_FACTORS = "rope_freqs.weight"
# (factor, low, high, original context) of the published models that ship rotary factors as a tensor.
ROPE_SETTINGS = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
# Metadata that changes the function in ways the three architectures above do not know in Transformers.
FOREIGN = ("attention.sliding_window", "attention.scale", "rope.scaling.attn_factor", "attn_logit_softcapping")


class Parameter(NamedTuple):
    """One tensor of the model: its name in the GGUF file, its shape, and for q and k the heads to un-permute."""

    stored: str
    shape: tuple[int, ...]
    permuted_heads: int = 0


class Blueprint(NamedTuple):
    """``config``: the arguments of the Transformers configuration; ``parameters``: Transformers name -> source."""

    config: dict[str, Any]
    parameters: dict[str, Parameter]


def blueprint(file: GgufFile) -> Blueprint:
    """Read the architecture; raises UnsupportedError for what Transformers could not compute alike, SourceError for
    a tensor that is missing or of another shape than the metadata says."""
    name = file.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"'{file.path.name}' has GGUF architecture '{name}', which is not read (known: "
            f"{', '.join(sorted(ARCHITECTURES))}); use the safetensors release of this model."
        )
    architecture = ARCHITECTURES[name]
    config = _config(file, name, architecture)
    parameters = _parameters(file, architecture, config)
    _check_tensors(file, parameters)
    return Blueprint(config, parameters)


def _config(file: GgufFile, name: str, architecture: Architecture) -> dict[str, Any]:
    for key in FOREIGN:
        if file.fields.get(f"{name}.{key}"):
            raise _unsupported(file, f"{name}.{key}")
    if file.fields.get(f"{name}.expert_count"):
        raise _unsupported(file, f"{name}.expert_count")
    if file.fields.get(f"{name}.attention.causal") is False:
        raise _unsupported(file, f"{name}.attention.causal")
    width, heads = _whole(file, f"{name}.embedding_length"), _whole(file, f"{name}.attention.head_count")
    head_dim = _whole(file, f"{name}.attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _whole(file, f"{name}.{key}", head_dim) != head_dim:
            raise _unsupported(file, f"{name}.{key}")
    theta = float(file.fields.get(f"{name}.rope.freq_base", 10000.0))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise _missing(file, "token_embd.weight")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.model_class],
        "hidden_size": width,
        "intermediate_size": _whole(file, f"{name}.feed_forward_length"),
        "num_hidden_layers": _whole(file, f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(file, f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _whole(file, f"{name}.context_length"),
        "rms_norm_eps": _real(file, f"{name}.attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "rope_parameters": _rope(file, name, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if architecture.biased is None:
        config["attention_bias"] = _all_or_none(file, ATTENTION)
        config["mlp_bias"] = _all_or_none(file, FEED_FORWARD)
    return config | token_ids(file.fields)


def token_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``bos_token_id, eos_token_id, pad_token_id``; eos is a list where the file also names an end of turn."""
    eos, turn = fields.get("tokenizer.ggml.eos_token_id"), fields.get("tokenizer.ggml.eot_token_id")
    both = [eos, turn] if eos is not None and turn is not None and turn != eos else eos
    return {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": both,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _rope(file: GgufFile, name: str, theta: float, head_dim: int) -> dict[str, Any]:
    scaling = file.fields.get(f"{name}.rope.scaling.type", "none")
    if scaling == "linear":
        factor = _real(file, f"{name}.rope.scaling.factor")
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if scaling != "none":
        raise _unsupported(file, f"{name}.rope.scaling.type = {scaling}")
    if ROPE_FACTORS not in file.tensors:
        return {"rope_type": "default", "rope_theta": theta}
    stored = file.read(ROPE_FACTORS).flatten().tolist()
    for setting in ROPE_SETTINGS:
        wanted = rope_factors(theta, head_dim, *setting)
        if len(stored) == len(wanted) and all(map(_close, stored, wanted)):
            factor, low, high, original = setting
            return {
                "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
                "high_freq_factor": high, "original_max_position_embeddings": original,
            }
    raise _unsupported(file, ROPE_FACTORS)


def _close(stored: float, wanted: float) -> bool:
    return math.isclose(stored, wanted, rel_tol=1e-4)


def rope_factors(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> list[float]:
    """What each of the ``head_dim / 2`` rotary frequencies is divided by: 1 for short wavelengths, ``factor`` for
    those longer than ``original / low`` tokens, and a blend between ``original / high`` and that."""
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        blend = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - blend) / factor + blend))
    return factors


def _parameters(file: GgufFile, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Parameter]:
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    head_dim, heads, kv_heads = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    inner, queries, keys = config["intermediate_size"], heads * head_dim, kv_heads * head_dim
    shapes = {
        "attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width), "attn_output": (width, queries),
        "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner),
    }
    permuted = {"attn_q": heads, "attn_k": kv_heads} if architecture.permuted else {}
    biased = architecture.biased
    if biased is None:
        biased = frozenset(ATTENTION * config["attention_bias"] + FEED_FORWARD * config["mlp_bias"])
    found = {"model.embed_tokens.weight": Parameter("token_embd.weight", (vocabulary, width))}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        found[f"{ours}.input_layernorm.weight"] = Parameter(f"{theirs}.attn_norm.weight", (width,))
        for short, long in LINEARS.items():
            turned = permuted.get(short, 0)
            found[f"{ours}.{long}.weight"] = Parameter(f"{theirs}.{short}.weight", shapes[short], turned)
            if short in biased:
                found[f"{ours}.{long}.bias"] = Parameter(f"{theirs}.{short}.bias", shapes[short][:1], turned)
        if architecture.head_norms:
            for letter in "qk":
                norm = Parameter(f"{theirs}.attn_{letter}_norm.weight", (head_dim,))
                found[f"{ours}.self_attn.{letter}_norm.weight"] = norm
        found[f"{ours}.post_attention_layernorm.weight"] = Parameter(f"{theirs}.ffn_norm.weight", (width,))
    found["model.norm.weight"] = Parameter("output_norm.weight", (width,))
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = Parameter("output.weight", (vocabulary, width))
    return found


def _check_tensors(file: GgufFile, parameters: Mapping[str, Parameter]) -> None:
    for parameter in parameters.values():
        info = file.tensors.get(parameter.stored)
        if info is None:
            raise _missing(file, parameter.stored)
        if info.shape != parameter.shape:
            raise SourceError(
                f"Tensor '{parameter.stored}' of '{file.path.name}' has shape {list(info.shape)} where its metadata "
                f"ask for {list(parameter.shape)}; get the file again."
            )
    unknown = file.tensors.keys() - {parameter.stored for parameter in parameters.values()} - {ROPE_FACTORS}
    if unknown:
        raise _unsupported(file, sorted(unknown)[0])


def _all_or_none(file: GgufFile, linears: tuple[str, ...]) -> bool:
    present = [f"blk.0.{name}.bias" in file.tensors for name in linears]
    if any(present) and not all(present):
        raise _unsupported(file, f"a bias on some of {', '.join(linears)} only")
    return all(present)


def _whole(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.fields.get(key, default)
    if value is None:
        raise SourceError(f"'{file.path.name}' lacks the metadata '{key}'; get the file again.")
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UnsupportedError(
            f"'{file.path.name}' has metadata '{key}' = {str(value)[:60]}, not one positive number; "
            "use the safetensors release of this model."
        )
    return value


def _real(file: GgufFile, key: str) -> float:
    value = file.fields.get(key)
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise SourceError(f"'{file.path.name}' lacks a positive number under '{key}'; get the file again.")
    # Stored in 32 bits: the shortest decimal that gives the same 32 bits is what its author wrote.
    return float(f"{value:.7g}")


def _missing(file: GgufFile, tensor: str) -> SourceError:
    return SourceError(f"'{file.path.name}' lacks tensor '{tensor}'; get the file again.")


def _unsupported(file: GgufFile, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"'{file.path.name}' uses {what}, which is not read from GGUF; use the safetensors release of this model."
    )
