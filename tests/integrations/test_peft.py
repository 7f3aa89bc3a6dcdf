"""Adapters train over compressed layers; merging one is refused unless it means compressing anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor

import rarefy
from rarefy.contracts import Layer, Recipe, Rule, Solution, WeightRecipe, weight_recipes
from rarefy.core.errors import OptionError, RarefyError, UnsupportedError
from rarefy.integrations.transformers.models import manifest_of
from rarefy.layers import CompressedLinear
from rarefy.layers.swap import compressed
from rarefy.recipes.weights.rtn import Rtn
from tests.integrations.conftest import EIGHT_BITS, Compressed, python
from tests.zoo import FAMILIES, logits, same_bytes, tensors

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.compat


def adapted(folder: Path, family: str = "llama", **settings: Any) -> Any:
    """A LoRA on every linear layer of a loaded model, with weights that change its logits."""
    base = FAMILIES[family].model_class.from_pretrained(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.eval()


def train(model: Any, steps: int = 8, family: str = "llama") -> list[float]:
    inputs = FAMILIES[family].inputs()
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def output(model: Any, family: str = "llama") -> Tensor:
    return logits(model, family)


# PEFT itself refuses DoRA on a router.
@pytest.mark.parametrize(("family", "dora"), [("llama", False), ("llama", True), ("gpt2", True), ("qwen3_moe", False)])
def test_adapters_train(family: str, dora: bool, folders: Compressed) -> None:
    base = FAMILIES[family].model_class.from_pretrained(folders(family, num_bits=4, group_size=16))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", use_dora=dora))
    losses = train(model, family=family)
    assert losses[-1] < losses[0] - 0.2
    after = {name.replace("base_layer.", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_adapters_start_as_nothing_and_save_by_themselves(folders: Compressed, tmp_path: Path) -> None:
    base = FAMILIES["llama"].model_class.from_pretrained(folders("llama"))
    expected = output(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(output(model), expected)
    train(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(FAMILIES["llama"].model_class.from_pretrained(folders("llama")), tmp_path)
    assert torch.equal(output(again.eval()), output(model))
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_adapters_of_transformers_own(folders: Compressed, tmp_path: Path) -> None:
    from transformers.integrations import peft as seam

    try:
        seam.check_peft_version(min_version=seam.MIN_PEFT_VERSION)
    except ValueError:
        pytest.skip(f"this Transformers wants PEFT {seam.MIN_PEFT_VERSION}, which is not installed")
    model = FAMILIES["llama"].model_class.from_pretrained(folders("llama"))
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = FAMILIES["llama"].model_class.from_pretrained(folders("llama"))
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.allclose(output(again.eval()), output(model), atol=1e-6)


def test_trainer_takes_an_adapted_model(folders: Compressed, tmp_path: Path) -> None:
    base = FAMILIES["llama"].model_class.from_pretrained(folders("llama"))
    base.enable_input_require_grads()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, learning_rate=0.02, report_to=[],
        use_cpu=True, save_strategy="no", gradient_checkpointing=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_in_place_is_refused_with_our_sentence(safe: bool, dora: bool, folders: Compressed) -> None:
    model = adapted(folders("llama"), use_dora=dora)
    with pytest.raises(UnsupportedError, match=r"rarefy\.merge_adapter"):
        model.merge_and_unload(safe_merge=safe)
    with pytest.raises(UnsupportedError, match=r"rarefy\.merge_adapter"):
        model.merge_adapter(safe_merge=safe)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_merged_anew_saved_and_loaded(family: str, folders: Compressed, tmp_path: Path) -> None:
    model = adapted(folders(family), family, use_rslora=True)
    untouched = output(FAMILIES[family].model_class.from_pretrained(folders(family)), family)
    wanted = output(model, family)
    merged = rarefy.merge_adapter(model)
    assert type(merged) is FAMILIES[family].model_class and not any("lora" in name for name in merged.state_dict())
    result = output(merged, family)
    assert float((result - wanted).norm() / wanted.norm()) < 0.02
    assert float((untouched - wanted).norm() / wanted.norm()) > 0.1
    rarefy.save(merged, tmp_path / "own")
    merged.save_pretrained(tmp_path / "plain")
    assert same_bytes(tensors(tmp_path / "own"), tensors(tmp_path / "plain"))
    for name in ("own", "plain"):
        assert torch.equal(output(rarefy.load(tmp_path / name), family), result)
    manifest = manifest_of(merged)
    assert set(manifest.terms()) == {name for name, _ in compressed(merged)}
    assert manifest.report is not None and "an adapter was merged" in manifest.report.notes


def test_merging_by_another_recipe(folders: Compressed, tmp_path: Path) -> None:
    recipe = Recipe(
        name="two",
        rules=(
            Rule(method="rtn", targets=("re:.*up_proj",), options={"num_bits": 3, "group_size": 16}),
            Rule(method="rtn", options={"num_bits": 6, "group_size": 16}),
        ),
    )
    merged = rarefy.merge_adapter(adapted(folders("llama")), recipe)
    bits = {name: layer.terms[0].spec.grid.num_bits for name, layer in compressed(merged)}
    assert {bits[name] for name in bits if name.endswith("up_proj")} == {3}
    assert {bits[name] for name in bits if not name.endswith("up_proj")} == {6}
    rarefy.save(merged, tmp_path / "own")
    assert torch.equal(output(rarefy.load(tmp_path / "own")), output(merged))


def test_merging_some_layers_keeps_the_others(folders: Compressed, tmp_path: Path) -> None:
    base = FAMILIES["llama"].model_class.from_pretrained(folders("llama"))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)).eval()
    wanted = output(model)
    merged = rarefy.merge_adapter(model)
    assert float((output(merged) - wanted).norm() / wanted.norm()) < 0.02
    for name, tensor in merged.state_dict().items():
        assert ("v_proj" in name) or torch.equal(tensor, before[name])


def test_adapters_on_dense_layers_are_added(folders: Compressed) -> None:
    """The head is dense: PEFT can add to it, and nothing of what was trained may get lost."""
    base = FAMILIES["llama"].model_class.from_pretrained(folders("llama"))
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    wanted, head = output(model), base.lm_head.base_layer.weight.detach().clone()
    merged = rarefy.merge_adapter(model)
    assert not torch.equal(merged.lm_head.weight, head)
    assert float((output(merged) - wanted).norm() / wanted.norm()) < 0.02


def test_modules_that_were_trained_whole_stay(folders: Compressed, tmp_path: Path) -> None:
    base = FAMILIES["llama"].model_class.from_pretrained(folders("llama"))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    train(model)
    wanted = output(model)
    merged = rarefy.merge_adapter(model)
    assert float((output(merged) - wanted).norm() / wanted.norm()) < 0.02
    rarefy.save(merged, tmp_path / "own")
    assert torch.equal(output(rarefy.load(tmp_path / "own")), output(merged))


def test_two_active_adapters(folders: Compressed) -> None:
    model = adapted(folders("llama"))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    wanted = output(model)
    assert float((output(rarefy.merge_adapter(model)) - wanted).norm() / wanted.norm()) < 0.02


def test_what_cannot_be_merged(folders: Compressed) -> None:
    dense = FAMILIES["llama"].build()
    with pytest.raises(OptionError, match="carries no PEFT adapter"):
        rarefy.merge_adapter(dense)
    with pytest.raises(OptionError, match="not compressed by rarefy"):
        rarefy.merge_adapter(peft.get_peft_model(dense, peft.LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(UnsupportedError, match="not a plain LoRA"):
        rarefy.merge_adapter(adapted(folders("llama"), use_dora=True))
    with pytest.raises(OptionError, match="no rule for it"):
        recipe = Recipe(name="few", rules=(Rule(method="rtn", targets=("re:.*up_proj",)),))
        rarefy.merge_adapter(adapted(folders("llama")), recipe)
    base = FAMILIES["llama"].model_class.from_pretrained(folders("llama"))
    only_head = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(OptionError, match="merge_and_unload"):
        rarefy.merge_adapter(only_head)
    biased = adapted(folders("gpt2"), "gpt2", lora_bias=True)
    with pytest.raises(UnsupportedError, match="not a plain LoRA"):
        rarefy.merge_adapter(biased)


def test_an_adapter_that_cannot_be_compressed_leaves_the_model_alone(folders: Compressed) -> None:
    model = adapted(folders("llama"))
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RarefyError, match=r"model\.layers\.1\.mlp\.down_proj"):
        rarefy.merge_adapter(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())


def test_saving_with_adapters_on_is_refused(folders: Compressed, tmp_path: Path) -> None:
    model = adapted(folders("llama"))
    for one in (model, model.get_base_model()):
        with pytest.raises(OptionError, match="adapters"):
            rarefy.save(one, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    base = model.unload()
    rarefy.save(base, tmp_path / "out")
    assert same_bytes(tensors(tmp_path / "out"), tensors(folders("llama")))
    assert isinstance(rarefy.load(tmp_path / "out").model.layers[0].mlp.up_proj, CompressedLinear)


def test_merging_is_the_first_thing_a_process_does(folders: Compressed, tmp_path: Path) -> None:
    """Recipes are found although nothing was compressed before."""
    code = """
import sys, rarefy, peft
model = peft.get_peft_model(rarefy.load(sys.argv[1]), peft.LoraConfig(target_modules=["q_proj"]))
rarefy.save(rarefy.merge_adapter(model), sys.argv[2])
"""
    done = python(code, folders("llama"), tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    wanted = output(rarefy.load(folders("llama")))
    assert float((output(rarefy.load(tmp_path / "merged")) - wanted).norm() / wanted.norm()) < 0.02


def test_layers_of_a_recipe_that_is_not_installed_stay(tmp_path: Path) -> None:
    """Only layers with an adapter are compressed anew, so only their recipes are needed."""
    model = FAMILIES["llama"].build()
    rules = (
        Rule(method="visiting", targets=("re:.*mlp",)),
        Rule(method="rtn", options=EIGHT_BITS),
    )
    weight_recipes.register("visiting")(Visiting)
    try:
        rarefy.compress(model, Recipe(name="two", rules=rules))
    finally:
        del weight_recipes._entries["visiting"]
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, adapter).eval()
    wanted = output(wrapped)
    merged = rarefy.merge_adapter(wrapped)
    assert float((output(merged) - wanted).norm() / wanted.norm()) < 0.02
    rarefy.save(merged, tmp_path / "merged")
    assert torch.equal(output(rarefy.load(tmp_path / "merged")), output(merged))
    again = FAMILIES["llama"].model_class.from_pretrained(tmp_path / "merged")
    with pytest.raises(RarefyError, match="visiting"):
        rarefy.merge_adapter(peft.get_peft_model(again, peft.LoraConfig(target_modules=["up_proj"])))


class Visiting(WeightRecipe):
    recipe_version: ClassVar[int] = 3

    def solve(self, layer: Layer) -> Solution:
        return Rtn(num_bits=6, group_size=16).solve(layer)
