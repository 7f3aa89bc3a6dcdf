from __future__ import annotations

import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rarefy.core.errors import RarefyError, SourceError, UnsupportedError
from rarefy.core.files import read_header
from rarefy.sources.gguf import describe, open_gguf
from rarefy.sources.gguf_header import read_gguf
from rarefy.sources.models import open_model
from rarefy.sources.shards import plan_shards, write_shards
from tests.sources.tiny_gguf import TEMPLATE, stored_tensors, tiny_model, write_gguf

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 64}),
    "llama wide heads": ("llama", {"head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}
TOKENS = torch.arange(60).reshape(2, 30) * 4


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("case", MODELS)
def test_a_float_file_is_the_model_it_was_written_from(case: str, tmp_path: Path, cache: Path) -> None:
    model_type, options = MODELS[case]
    original = tiny_model(model_type, **options)
    write_gguf(tmp_path / "tiny.gguf", original)
    source = open_model(tmp_path / "tiny.gguf")
    again = AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
    assert again.dtype == torch.float32
    assert type(again) is type(original)
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    torch.testing.assert_close(logits(again), logits(original), rtol=1e-5, atol=1e-5)


def test_linear_rope_scaling_is_kept(tmp_path: Path, cache: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    original = tiny_model("llama", rope_parameters=rope)
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "tiny.gguf", original, fields=scaling)
    again = AutoModelForCausalLM.from_pretrained(open_model(tmp_path / "tiny.gguf").folder)
    torch.testing.assert_close(logits(again), logits(original), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_1", "Q4_0", "Q5_1", "F16", "BF16"])
def test_weights_are_the_decoded_blocks(quantization: str, tmp_path: Path, cache: Path) -> None:
    original = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", original, quantization)
    source = open_model(tmp_path / "tiny.gguf")
    again = AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
    expected = {"F16": torch.float16, "BF16": torch.bfloat16}.get(quantization, torch.float32)
    assert again.dtype == expected
    kind = gguf.GGMLQuantizationType[quantization]
    stored = stored_tensors(again.float())
    for name, tensor in stored_tensors(original).items():
        if tensor.ndim > 1:
            decoded = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind).copy())
            torch.testing.assert_close(stored[name], decoded, rtol=0, atol=0)


# Transformers takes the head width of Qwen3 to be 128 whatever the file says.
@pytest.mark.parametrize(("model_type", "head_dim"), [("llama", 16), ("qwen2", 16), ("qwen3", 128)])
def test_transformers_reads_the_same_model(model_type: str, head_dim: int, tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model(model_type, head_dim=head_dim), "Q8_0")
    ours = AutoModelForCausalLM.from_pretrained(open_model(tmp_path).folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_the_folder_is_complete(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), "Q4_1")
    source = open_model(tmp_path / "tiny.gguf")
    assert (source.name, source.folder.parent) == ("tiny", cache / "models")
    assert source.note == "dense reference = dequantized Q4_1 checkpoint, not the original release"
    assert (source.folder / "chat_template.jinja").read_text("utf-8") == TEMPLATE
    assert 'license: "mit"' in (source.folder / "README.md").read_text("utf-8")
    generation = GenerationConfig.from_pretrained(source.folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    config = json.loads((source.folder / "config.json").read_text("utf-8"))
    assert config["rms_norm_eps"] == 1e-5
    assert read_header(source.folder / "model.safetensors").metadata == {"format": "pt"}
    assert AutoTokenizer.from_pretrained(source.folder).apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False
    ) == "hello"


def test_a_file_is_converted_once_until_it_changes(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("llama"))
    first = open_gguf(path).folder
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert open_gguf(path).folder == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    write_gguf(path, tiny_model("llama", tie_word_embeddings=False))
    assert open_gguf(path).folder != first


def test_mixed_types_are_named_by_size(tmp_path: Path) -> None:
    write_gguf(tmp_path / "half.gguf", tiny_model("llama"), "F16")
    assert describe(read_gguf(tmp_path / "half.gguf")) == "F16 checkpoint"


def test_two_turn_ends_become_two_eos(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), fields={"tokenizer.ggml.eot_token_id": 0})
    assert GenerationConfig.from_pretrained(open_gguf(tmp_path / "tiny.gguf").folder).eos_token_id == [2, 0]


REFUSED: dict[str, tuple[dict[str, Any], type[RarefyError], str]] = {
    "architecture": ({"general.architecture": "mamba"}, UnsupportedError, "'mamba'"),
    "experts": ({"llama.expert_count": 8}, UnsupportedError, "llama.expert_count"),
    "window": ({"llama.attention.sliding_window": 4096}, UnsupportedError, "sliding_window"),
    "rope": ({"llama.rope.scaling.type": "yarn"}, UnsupportedError, "yarn"),
    "partial rope": ({"llama.rope.dimension_count": 8}, UnsupportedError, "dimension_count"),
    "heads by layer": ({"llama.attention.head_count_kv": [2, 1]}, UnsupportedError, "head_count_kv"),
    "no width": ({"llama.embedding_length": None}, SourceError, "llama.embedding_length"),
    "more layers": ({"llama.block_count": 3}, SourceError, "blk.2.attn_norm.weight"),
    "fewer layers": ({"llama.block_count": 1}, UnsupportedError, "blk.1.attn_k.weight"),
    "other width": ({"llama.feed_forward_length": 128}, SourceError, "blk.0.ffn_gate.weight"),
    "parts": ({"split.count": 3}, UnsupportedError, "3 parts"),
    "tokenizer": ({"tokenizer.ggml.model": "t5"}, UnsupportedError, "'t5'"),
    "cutting rule": ({"tokenizer.ggml.pre": "falcon"}, UnsupportedError, "'falcon'"),
    "merges": ({"tokenizer.ggml.merges": ["h zz"]}, SourceError, "merges"),
    "special token": ({"tokenizer.ggml.eos_token_id": 99999}, SourceError, "eos token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_alike_is_refused_by_name(case: str, tmp_path: Path, cache: Path) -> None:
    fields, error, part = REFUSED[case]
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), fields=fields)
    with pytest.raises(error, match=part):
        open_model(tmp_path / "tiny.gguf")
    assert not list(cache.glob("models/*/*")), "something half-written is left"


def test_unknown_rope_factors_are_refused(tmp_path: Path, cache: Path) -> None:
    rope = LLAMA3_ROPE | {"factor": 5.0}
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", rope_parameters=rope, head_dim=64))
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight"):
        open_gguf(tmp_path / "tiny.gguf")


def test_nan_weights_are_refused(tmp_path: Path, cache: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    write_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(SourceError, match=r"blk\.1\.ffn_up\.weight.*NaN"):
        open_gguf(tmp_path / "tiny.gguf")
    assert not list(cache.glob("models/*/*"))


def test_without_the_gguf_package_the_command_is_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    monkeypatch.setitem(sys.modules, "gguf", None)  # what Python itself does for a failed import
    with pytest.raises(SourceError, match="pip install gguf"):
        open_gguf(tmp_path / "tiny.gguf")


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("llama"), "Q8_0")
    whole = path.read_bytes()
    header = len(whole) - sum(info.nbytes for info in read_gguf(path).tensors.values())
    dice = random.Random(0)
    damaged = [whole[:cut] for cut in (0, 3, 4, 10, 24, 100, 5000, header, len(whole) - 100)]
    damaged += [b"GGML" + whole[4:], whole[:4] + struct.pack("<I", 1) + whole[8:]]
    damaged += [whole[:8] + struct.pack("<Q", 2**60) + whole[16:], whole[:16] + struct.pack("<Q", 2**60) + whole[24:]]
    for _ in range(300):
        bad, at = bytearray(whole), dice.randrange(4, header)
        bad[at : at + 8] = dice.choice([b"\xff" * 8, dice.randbytes(8)])
        damaged.append(bytes(bad))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            read_gguf(path)
        except RarefyError as failure:
            refused += 1
            assert "\n" not in str(failure)
    assert refused >= 13


def test_shards_are_cut_by_size_and_indexed(tmp_path: Path) -> None:
    assert plan_shards({"a": 6, "b": 6, "c": 4, "d": 30, "e": 1}, 10) == [["a"], ["b", "c"], ["d"], ["e"]]
    original = tiny_model("llama", tie_word_embeddings=False)
    original.config.architectures = ["LlamaForCausalLM"]
    original.config.save_pretrained(tmp_path)
    state = original.state_dict()
    sizes = {name: tensor.nbytes for name, tensor in state.items()}
    write_shards(tmp_path, sizes, state.__getitem__, max_shard_bytes=100_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(original), rtol=0, atol=0)
