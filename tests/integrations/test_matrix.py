"""Every family: compress a folder, load it with Transformers, save it again in every way, and get the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import rarefy
from rarefy.core.errors import RecipeError, UnsupportedError
from rarefy.integrations.transformers.models import manifest_of
from rarefy.layers import CompressedLinear, CompressedStack
from rarefy.layers.swap import compressed
from tests.integrations.conftest import EIGHT_BITS, Compressed
from tests.zoo import FAMILIES, dense_folder, logits, same_bytes, tensors

pytestmark = pytest.mark.compat

families = pytest.mark.parametrize("family", FAMILIES)
FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"num_bits": 4, "group_size": 20},
    "int3": {"num_bits": 3, "group_size": 16, "zero_point": "float", "clip": "mse"},
    "nf4": {"format": "nf4", "group_size": 16},
    "lut": {"format": "lut", "num_bits": 4},
    "ternary": {"format": "ternary", "group_size": 16},
}


def load(family: str, folder: Path, **options: Any) -> Any:
    return FAMILIES[family].model_class.from_pretrained(folder, **options)


@families
def test_loaded_equals_the_model_compressed_in_memory(family: str, folders: Compressed) -> None:
    folder = folders(family)
    model, dense = load(family, folder), load(family, folder.parent / "dense")
    in_memory = FAMILIES[family].build()
    rarefy.compress(in_memory, "rtn", options=EIGHT_BITS)
    result, exact = logits(model, family), logits(dense, family)
    assert torch.equal(result, logits(in_memory, family))
    assert float((result - exact).norm() / exact.norm()) < 0.02
    assert not torch.equal(result, exact)
    assert sum(1 for _ in compressed(model)) == sum(1 for _ in compressed(in_memory)) >= 8
    assert not model.training and all(not layer.training for _, layer in compressed(model))


@families
def test_saved_again_it_is_the_same(family: str, folders: Compressed, tmp_path: Path) -> None:
    folder = folders(family)
    model = load(family, folder)
    expected, stored = logits(model, family), tensors(folder)
    model.save_pretrained(tmp_path / "plain")
    rarefy.save(model, tmp_path / "own")
    in_memory = FAMILIES[family].build()
    rarefy.compress(in_memory, "rtn", options=EIGHT_BITS, out=tmp_path / "memory")
    for name in ("plain", "own", "memory"):
        assert same_bytes(tensors(tmp_path / name), stored), name
        again = rarefy.load(tmp_path / name)
        assert type(again) is FAMILIES[family].model_class
        assert torch.equal(logits(again, family), expected), name
        assert "transformers_weights" not in json.loads((tmp_path / name / "config.json").read_text())
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    assert (tmp_path / "own" / "rarefy.safetensors").is_file()
    assert not (tmp_path / "own" / "model.safetensors").exists()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_shards(family: str, folders: Compressed, tmp_path: Path) -> None:
    whole, sharded = folders(family), folders(family, shard="24KB")
    assert len(list(sharded.glob("rarefy-*-of-*.safetensors"))) > 2
    assert same_bytes(tensors(whole), tensors(sharded))
    model = load(family, sharded)
    expected = logits(load(family, whole), family)
    assert torch.equal(logits(model, family), expected)
    model.save_pretrained(tmp_path / "plain", max_shard_size="24KB")
    rarefy.save(model, tmp_path / "own", max_shard_size="24KB")
    assert len(list((tmp_path / "plain").glob("model-*-of-*.safetensors"))) > 2
    for name in ("plain", "own"):
        assert same_bytes(tensors(tmp_path / name), tensors(whole))
        assert torch.equal(logits(load(family, tmp_path / name), family), expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_formats(family: str, name: str, folders: Compressed, tmp_path: Path) -> None:
    folder = folders(family, **FORMATS[name])
    model, in_memory = load(family, folder), FAMILIES[family].build()
    rarefy.compress(in_memory, "rtn", options=FORMATS[name])
    expected = logits(model, family)
    assert torch.equal(expected, logits(in_memory, family))
    model.save_pretrained(tmp_path / "plain")
    assert same_bytes(tensors(tmp_path / "plain"), tensors(folder))
    assert torch.equal(logits(load(family, tmp_path / "plain"), family), expected)


@families
def test_heads_and_embeddings_stay_dense(family: str, folders: Compressed) -> None:
    model = load(family, folders(family))
    parts = {name for name, _ in compressed(model)}
    assert not any("embed" in name or name.endswith(("lm_head", "classifier", "decoder")) for name in parts)
    head = model.get_output_embeddings()
    if head is not None:
        tied = head.weight is model.get_input_embeddings().weight
        assert tied == (family not in ("llama", "qwen3", "qwen3_moe"))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma3", "opt", "bert_lm"])
def test_head_that_a_target_names(family: str, tmp_path: Path) -> None:
    head = "cls.predictions.decoder" if family == "bert_lm" else "lm_head"
    dense = dense_folder(family, tmp_path / "dense")
    recipe = rarefy_recipe(targets=("Linear", head))
    report = rarefy.compress(tmp_path / "dense", recipe, out=tmp_path / "small", device="cpu")
    assert head in {layer.name for layer in report.layers}
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model = load(family, tmp_path / "small")
    assert isinstance(model.get_submodule(head), CompressedLinear)
    result, exact = logits(model, family), logits(dense, family)
    assert float((result - exact).norm() / exact.norm()) < 0.02

    in_memory = FAMILIES[family].build()
    rarefy.compress(in_memory, recipe, out=tmp_path / "memory")
    assert torch.equal(logits(in_memory, family), result)
    in_memory.save_pretrained(tmp_path / "plain")
    for name in ("memory", "plain"):
        assert same_bytes(tensors(tmp_path / name), tensors(tmp_path / "small")), name
        assert torch.equal(logits(load(family, tmp_path / name), family), result), name
    if family != "llama":
        assert any("tied output head" in note for note in report.notes)


def test_tied_head_that_is_on_disk_too(tmp_path: Path) -> None:
    """Some checkpoints store the head although their config ties it."""
    dense = dense_folder("llama", tmp_path / "dense", tie_word_embeddings=False)
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    rarefy.compress(tmp_path / "dense", "rtn", options=EIGHT_BITS, out=tmp_path / "default", device="cpu")
    assert rarefy.load(tmp_path / "default").config.tie_word_embeddings
    rarefy.compress(tmp_path / "dense", rarefy_recipe(("Linear", "lm_head")), out=tmp_path / "head", device="cpu")
    model = rarefy.load(tmp_path / "head")
    assert isinstance(model.lm_head, CompressedLinear)
    exact = logits(dense, "llama")
    assert float((logits(model, "llama") - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("in_memory", [True, False])
def test_tied_head_of_an_encoder_decoder_is_refused(in_memory: bool, tmp_path: Path) -> None:
    model = dense_folder("t5", tmp_path / "dense")
    before = logits(model, "t5")
    with pytest.raises(RecipeError, match="encoder-decoder"):
        source = model if in_memory else tmp_path / "dense"
        rarefy.compress(source, rarefy_recipe(("Linear", "lm_head")), out=tmp_path / "small", device="cpu")
    assert torch.equal(logits(model, "t5"), before)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_reads_a_dtype_without_decoding(dtype: torch.dtype, folders: Compressed, monkeypatch: Any) -> None:
    """T5 asks for ``wo.weight.dtype`` in each step, and keeps ``wo`` in float32 in a float16 model."""
    folder = folders("t5")
    model = load("t5", folder, dtype=dtype)
    assert same_bytes(codes(model), {name: tensor for name, tensor in tensors(folder).items() if ".terms." in name})
    monkeypatch.setattr(CompressedLinear, "decode", lambda self: pytest.fail("a weight was decoded"))
    result = logits(model, "t5")
    assert torch.isfinite(result).all() and result.dtype == dtype
    exact = logits(load("t5", folder.parent / "dense"), "t5")
    assert float((result.float() - exact).norm() / exact.norm()) < 0.05
    wo = {layer.dtype for name, layer in compressed(model) if name.endswith(".wo")}
    dense = load("t5", folder.parent / "dense", dtype=dtype)
    assert wo == {module.weight.dtype for name, module in dense.named_modules() if name.endswith(".wo")}


def test_experts_are_stacks_that_run_one_by_one(folders: Compressed) -> None:
    model = load("qwen3_moe", folders("qwen3_moe"))
    stacks = {name: module for name, module in compressed(model) if isinstance(module, CompressedStack)}
    assert sorted(stacks) == [f"model.layers.{i}.mlp.experts.{part}" for i in (0, 1) for part in PARTS]
    assert stacks["model.layers.0.mlp.experts.down_proj"].shape == (4, 48, 40)
    exact = logits(
        load("qwen3_moe", folders("qwen3_moe").parent / "dense", experts_implementation="eager"), "qwen3_moe"
    )
    result = logits(model, "qwen3_moe")
    assert float((result - exact).norm() / exact.norm()) < 0.02
    assert set(manifest_of(model).terms()) == {name for name, _ in compressed(model)}


PARTS = ("down_proj", "gate_up_proj")


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm"])
def test_implementations_that_want_dense_experts_are_refused_by_name(name: str, folders: Compressed) -> None:
    model = load("qwen3_moe", folders("qwen3_moe"))
    model.set_experts_implementation(name)
    with pytest.raises(UnsupportedError, match=r"set_experts_implementation\('eager'\)"):
        logits(model, "qwen3_moe")
    model.set_experts_implementation("eager")
    assert torch.isfinite(logits(model, "qwen3_moe")).all()


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "llama"])
def test_dequantize_gives_the_family_s_own_layers_back(family: str, folders: Compressed, tmp_path: Path) -> None:
    model = load(family, folders(family))
    expected = logits(model, family)
    model.dequantize()
    assert not list(compressed(model))
    assert torch.allclose(logits(model, family), expected, atol=1e-5)
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Conv1D" in kinds) == (family == "gpt2")
    model.save_pretrained(tmp_path / "dense")
    assert torch.allclose(logits(load(family, tmp_path / "dense"), family), expected, atol=1e-5)


def test_gpt2_keeps_its_orientation(folders: Compressed) -> None:
    model, dense = load("gpt2", folders("gpt2")), load("gpt2", folders("gpt2").parent / "dense")
    layer, other = model.transformer.h[0].attn.c_attn, dense.transformer.h[0].attn.c_attn
    assert (layer.out_features, layer.in_features) == (144, 48)
    assert torch.allclose(layer.decode(), other.weight.T, atol=2e-3)
    assert torch.equal(layer.bias, other.bias)


def test_classes_of_llama_4_experts_are_left_alone() -> None:
    """They multiply the whole stack, in the other orientation; the report says why they stay dense."""
    config = transformers.Llama4TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        exact = model(tokens).logits
        report = rarefy.compress(model, "rtn", options=EIGHT_BITS)
        result = model(tokens).logits
    assert "one dense tensor" in report.skipped["model.layers.0.feed_forward.experts.gate_up_proj"]
    assert float((result - exact).norm() / exact.norm()) < 0.1


def rarefy_recipe(targets: tuple[str, ...]) -> Any:
    from rarefy.contracts import Recipe, Rule

    return Recipe(name="with-head", rules=(Rule(method="rtn", targets=targets, options=EIGHT_BITS),))


def codes(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".terms." in name}


def test_what_a_class_makes_by_itself_may_be_absent(tmp_path: Path) -> None:
    """Marian never saves its sinusoids: its class computes them again, and no checkpoint lacks them."""
    config = transformers.MarianConfig(
        vocab_size=96, d_model=48, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=80, decoder_ffn_dim=80,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=32, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    model = transformers.MarianMTModel(config).eval()
    model.save_pretrained(tmp_path / "dense")
    rarefy.compress(tmp_path / "dense", "rtn", options=EIGHT_BITS, out=tmp_path / "small", device="cpu")
    rarefy.compress(model, "rtn", options=EIGHT_BITS, out=tmp_path / "memory")
    with torch.no_grad():
        expected = model(**FAMILIES["t5"].inputs()).logits
        for name in ("small", "memory"):
            assert not any("embed_positions" in key for key in tensors(tmp_path / name))
            assert torch.equal(rarefy.load(tmp_path / name)(**FAMILIES["t5"].inputs()).logits, expected)
