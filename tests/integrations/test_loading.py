"""A loaded model behaves as any other: dtypes, devices, compilation, generation, training; never random weights."""

from __future__ import annotations

import copy
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import initialization

import rarefy
from rarefy.core.errors import CheckpointError, SourceError, UnsupportedError
from rarefy.integrations.transformers.config import RarefyConfig
from rarefy.layers import CompressedLinear, CompressedWeight
from rarefy.layers.execution import restore_
from rarefy.layers.swap import compressed
from tests.integrations.conftest import EIGHT_BITS, Compressed, python
from tests.processes import side_by_side
from tests.zoo import FAMILIES, dense_folder, logits, same_bytes, tensors, tiny_tokenizer

pytestmark = pytest.mark.compat

AutoModel = transformers.AutoModelForCausalLM
INT4 = {"num_bits": 4, "group_size": 16}


def stored(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".terms." in name}


# Without the package


def test_without_the_package_loading_fails(folders: Compressed) -> None:
    """Transformers alone warns about the unknown method and would go on; the weights' own name stops it."""
    code = """
import sys, transformers
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        print("LOADED")
    except OSError as failure:
        print("no file named model.safetensors" in str(failure))
"""
    done = python(code, folders("llama"), folders("llama", shard="24KB"))
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import rarefy, transformers",
        "from transformers import AutoConfig; import rarefy",
    ],
)
def test_the_order_of_imports_does_not_matter(imports: str, folders: Compressed) -> None:
    code = f"{imports}\nimport sys, torch\nfrom transformers import AutoModelForCausalLM as A\n"
    code += "print(float(A.from_pretrained(sys.argv[1])(torch.arange(9)[None]).logits.sum()))"
    done = python(code, folders("llama"))
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folders("llama"))(torch.arange(9)[None]).logits.sum()
    assert float(done.stdout.split()[-1]) == pytest.approx(float(expected), abs=1e-4)


def test_importing_rarefy_loads_no_heavy_library() -> None:
    done = python("import rarefy, sys; print({'torch', 'transformers'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


# Dtypes and devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_the_dtype_asked_for_never_touches_codes_or_scales(family: str, dtype: Any, folders: Compressed) -> None:
    folder = folders(family, **INT4)
    model = FAMILIES[family].model_class.from_pretrained(folder, dtype=dtype)
    assert same_bytes(stored(model), {name: t for name, t in tensors(folder).items() if ".terms." in name})
    wanted = torch.float32 if dtype == "auto" else dtype
    assert model.dtype == wanted and logits(model, family).dtype == wanted
    assert {layer.dtype for _, layer in compressed(model)} == {wanted}
    exact = logits(FAMILIES[family].model_class.from_pretrained(folder), family)
    assert float((logits(model, family).float() - exact).norm() / exact.norm()) < 0.05


def test_a_model_stored_in_16_bits_keeps_them(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    rarefy.compress(tmp_path / "dense", "rtn", options=INT4, out=tmp_path / "small", device="cpu")
    loaded = rarefy.load(tmp_path / "small")
    assert loaded.dtype == torch.bfloat16
    assert tensors(tmp_path / "small")["model.norm.weight"].dtype == torch.bfloat16
    rarefy.save(loaded, tmp_path / "again")
    assert same_bytes(tensors(tmp_path / "again"), tensors(tmp_path / "small"))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_casting_moves_activations_only(folders: Compressed) -> None:
    model = AutoModel.from_pretrained(folders("llama", **INT4))
    before, exact = stored(model), logits(model, "llama")
    model.to(torch.bfloat16)
    assert same_bytes(stored(model), before)
    assert {layer.dtype for _, layer in compressed(model)} == {torch.bfloat16} and model.dtype == torch.bfloat16
    assert logits(model, "llama").dtype == torch.bfloat16
    model.to(torch.float32)
    assert float((logits(model, "llama") - exact).norm() / exact.norm()) < 0.02
    model.to(device="cpu", dtype=torch.float64)
    assert same_bytes(stored(model), before) and logits(model, "llama").dtype == torch.float64
    for name in ("half", "float", "bfloat16", "double"):
        layer = copy.deepcopy(model.model.layers[0])
        getattr(layer, name)()
        assert same_bytes(
            {key: tensor for key, tensor in layer.state_dict().items() if ".terms." in key},
            {
                key.removeprefix("model.layers.0."): tensor
                for key, tensor in before.items()
                if key.startswith("model.layers.0.")
            },
        )


def test_half_of_transformers_is_refused_or_harmless(folders: Compressed) -> None:
    model = AutoModel.from_pretrained(folders("llama", **INT4))
    before = stored(model)
    with pytest.raises(ValueError, match="quantized"):
        model.half()
    assert same_bytes(stored(model), before)


def test_moving_to_the_meta_device_and_back_to_storage(folders: Compressed) -> None:
    model = AutoModel.from_pretrained(folders("llama"))
    layer = copy.deepcopy(model.model.layers[0].mlp.up_proj).to("meta")
    assert layer.device.type == "meta" and layer.weight.device.type == "meta"
    layer.to_empty(device="cpu")
    layer.load_state_dict(model.model.layers[0].mlp.up_proj.state_dict())
    assert torch.equal(layer.decode(), model.model.layers[0].mlp.up_proj.decode())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_deepcopy(family: str, folders: Compressed) -> None:
    model = FAMILIES[family].model_class.from_pretrained(folders(family))
    twin = copy.deepcopy(model)
    expected = logits(model, family)
    assert torch.equal(logits(twin, family), expected)
    restore_(twin)
    restore_(model)
    for name, buffer in twin.named_buffers():
        if ".terms." in name:
            assert buffer.data_ptr() != model.get_buffer(name).data_ptr()
            buffer.zero_()
    assert not torch.equal(logits(twin, family), expected)
    assert torch.equal(logits(model, family), expected)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_device_map(family: str, device_map: Any, folders: Compressed) -> None:
    plain = FAMILIES[family].model_class.from_pretrained(folders(family))
    mapped = FAMILIES[family].model_class.from_pretrained(folders(family), device_map=device_map)
    assert same_bytes(stored(mapped), stored(plain))
    assert torch.equal(logits(mapped, family).cpu(), logits(plain, family))


def test_offloading_to_disk_gives_the_same_bits(folders: Compressed, tmp_path: Path) -> None:
    folder = folders("llama")
    plain = AutoModel.from_pretrained(folder)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    mapped = AutoModel.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert torch.equal(logits(mapped, "llama"), logits(plain, "llama"))


# Computing


@pytest.mark.parametrize("options", [EIGHT_BITS, {"format": "nf4", "group_size": 16}], ids=["int8", "nf4"])
def test_compiles_as_one_graph(options: dict[str, Any], folders: Compressed) -> None:
    model = AutoModel.from_pretrained(folders("llama", **options))
    expected = logits(model, "llama")
    torch._dynamo.reset()
    graph = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        result = graph(**FAMILIES["llama"].inputs(), use_cache=False).logits
    assert torch.allclose(result, expected, atol=1e-5)


def test_a_module_that_reads_a_weight_compiles(folders: Compressed) -> None:
    layer = AutoModel.from_pretrained(folders("llama")).model.layers[0].mlp.up_proj
    torch._dynamo.reset()
    read = torch.compile(lambda x: torch.nn.functional.linear(x, layer.weight), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 48)
    assert torch.allclose(read(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "gemma3"])
def test_generate(family: str, folders: Compressed) -> None:
    model = FAMILIES[family].model_class.from_pretrained(folders(family))
    prompt = FAMILIES[family].inputs()["input_ids"][:1]
    made = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    tokens = prompt
    with torch.no_grad():
        for _ in range(6):
            best = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=-1)
    assert torch.equal(made, tokens)


def test_generate_for_an_encoder_decoder(folders: Compressed) -> None:
    model = FAMILIES["t5"].model_class.from_pretrained(folders("t5"))
    made = model.generate(FAMILIES["t5"].inputs()["input_ids"], max_new_tokens=5, do_sample=False, num_beams=2)
    assert made.shape[0] == 2


def test_pipeline(folders: Compressed, tmp_path: Path) -> None:
    shutil.copytree(folders("llama"), tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    generate = transformers.pipeline("text-generation", model=str(tmp_path / "model"))
    text = generate("a b c", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("a b c") and len(text.split()) > 3


def test_views_answer_without_decoding_and_refuse_writing(folders: Compressed, monkeypatch: Any) -> None:
    layer = AutoModel.from_pretrained(folders("llama")).model.layers[0].mlp.up_proj
    dense, x = layer.decode(), torch.randn(2, 3, 48)
    assert torch.equal(layer.weight + 0, dense) and torch.equal(layer.weight.T @ torch.eye(80), dense.T)
    assert torch.allclose(torch.nn.functional.linear(x, weight=layer.weight, bias=None), layer(x), atol=1e-6)
    assert torch.allclose(torch.nn.functional.linear(input=x, weight=layer.weight), layer(x), atol=1e-6)
    assert type(layer.weight.float() + 0) is Tensor and layer.weight.norm() > 0
    monkeypatch.setattr(CompressedLinear, "decode", lambda self: pytest.fail("a weight was decoded"))
    view = layer.weight
    assert isinstance(view, CompressedWeight)
    assert (view.dtype, view.shape, view.device.type) == (torch.float32, (80, 48), "cpu")
    assert "CompressedWeight" in repr(view) and not view.requires_grad
    torch.nn.functional.linear(x, view)
    for write in (
        lambda: view.add_(1), lambda: view.data.add_(1), lambda: view.__setitem__(0, 1.0), lambda: view.zero_(),
        lambda: setattr(view, "data", x), lambda: setattr(layer, "weight", nn.Parameter(dense)),
        lambda: torch.add(dense, 1, out=view), lambda: nn.init.normal_(view), lambda: setattr(view, "grad", dense),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="compress"), torch.no_grad():
            write()
    initialization.normal_(view)  # a parent's _init_weights: nothing to draw


def test_autocast_gives_the_low_precision_dtype(folders: Compressed) -> None:
    layer = AutoModel.from_pretrained(folders("gpt2")).transformer.h[0].attn.c_attn
    x = torch.randn(2, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


# Training


def test_gradient_checkpointing_reaches_the_inputs(folders: Compressed) -> None:
    model = AutoModel.from_pretrained(folders("llama"))
    plain = input_gradient(model)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.allclose(input_gradient(model), plain, atol=1e-6)
    dense = input_gradient(AutoModel.from_pretrained(folders("llama").parent / "dense"))
    assert float((plain - dense).norm() / dense.norm()) < 0.05


def input_gradient(model: Any) -> Tensor:
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=tokens, use_cache=False).loss.backward()
    return embedded.grad


def train_biases(rank: int, folder: Path, out: Path) -> None:
    """Steps of the biases in one of several processes, each on tokens of its own."""
    dist.init_process_group("gloo")
    torch.save(_biases_and_losses(rank, folder), out / f"{rank}.pt")
    # Whoever drops a group last waits for its threads: torch's reducer does so with the lock that they may want.
    gc.collect()
    dist.destroy_process_group()


def _biases_and_losses(rank: int, folder: Path) -> tuple[Tensor, Tensor]:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    before = stored(model)
    chosen = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is bias for bias in chosen))
    parallel = nn.parallel.DistributedDataParallel(model)
    tokens = torch.arange(8)[None] + 5 * rank
    optimizer = torch.optim.SGD(chosen, lr=0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = parallel(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert all(bias.grad is not None for bias in chosen)
    assert same_bytes(stored(model), before)
    return torch.cat([bias.detach() for bias in chosen]), torch.stack(losses)


@pytest.mark.parametrize("processes", [1, 2])
def test_distributed_data_parallel(processes: int, folders: Compressed, tmp_path: Path) -> None:
    """Buffers of every stored dtype are broadcast from the first process; all end with the same biases."""
    assert side_by_side(processes, train_biases, folders("gpt2"), tmp_path) == [0] * processes
    ends = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    assert all(torch.equal(biases, ends[0][0]) for biases, _ in ends)
    assert all(losses[-1] < losses[0] for _, losses in ends)


# Configurations, and what is refused


def test_config_is_an_ordinary_one(folders: Compressed) -> None:
    model = AutoModel.from_pretrained(folders("llama"))
    config = model.config.quantization_config
    assert isinstance(config, RarefyConfig) and "rtn" in repr(config)
    assert config.to_dict()["quant_method"] == "rarefy"
    assert json.loads(model.config.to_json_string())["quantization_config"]["rules"]
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert type(transformers.AutoConfig.from_pretrained(folders("llama"))) is type(model.config)
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()
    assert model.is_quantized and model.quantization_method == "rarefy"


def test_compressing_while_loading_is_refused_with_a_way_out(folders: Compressed) -> None:
    config = AutoModel.from_pretrained(folders("llama")).config.quantization_config
    with pytest.raises(Exception, match=r"pre-quantized|compressed first"):
        AutoModel.from_pretrained(folders("llama").parent / "dense", quantization_config=config)


def test_another_class_than_the_checkpoint_s_is_refused(folders: Compressed) -> None:
    """A new head would be random, and a model without the head has other names."""
    for other in (transformers.AutoModel, transformers.AutoModelForSequenceClassification):
        with pytest.raises(CheckpointError):
            other.from_pretrained(folders("llama"))


def test_dense_models_are_never_filled_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dense_folder("llama", tmp_path / "dense")
    whole = load_file(tmp_path / "dense" / "model.safetensors")
    del whole["model.layers.1.input_layernorm.weight"]
    save_file(whole, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks the tensor 'model\.layers\.1\.input_layernorm\.weight'"):
        rarefy.load(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.layers\.1\.input_layernorm\.weight'"):
        rarefy.compress(tmp_path / "dense", "rtn", out=tmp_path / "small", device="cpu")
    whole["model.layers.1.input_layernorm.weight"] = torch.ones(47)
    save_file(whole, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"'model\.layers\.1\.input_layernorm\.weight'.* another shape"):
        rarefy.load(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").write_bytes(b"\x10" + b"\0" * 30)
    with pytest.raises((SourceError, CheckpointError)):
        rarefy.load(tmp_path / "dense")


def test_a_library_that_reads_the_weight_itself(folders: Compressed) -> None:
    """``nn.MultiheadAttention`` passes ``out_proj.weight`` on instead of calling the layer."""
    layer = AutoModel.from_pretrained(folders("gpt2", **INT4)).transformer.h[0].attn.c_proj
    attention = nn.MultiheadAttention(48, 4, batch_first=True).eval()
    twin = copy.deepcopy(attention)
    attention.out_proj = layer
    twin.out_proj.weight, twin.out_proj.bias = nn.Parameter(layer.decode()), layer.bias
    x = torch.randn(2, 5, 48)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.allclose(attention(x, x, x)[0], twin(x, x, x)[0], atol=1e-6)
