"""Input scales: the function stays, and the norm or layer before takes the factor where it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rarefy
from rarefy.contracts import Recipe, Rule
from rarefy.core.errors import RecipeError
from rarefy.layers.swap import compressed
from tests.calibration import recipes
from tests.calibration.oracle import batches_for, close, input_moments, wide, wide_batches
from tests.calibration.recipes import FACTORS, SAMPLED, SEEN
from tests.zoo import dense_folder, family_of, logits, tensors

transformers.logging.set_verbosity_error()
# Layers of a block whose input no parameter before it can divide. They end in: heads that share values (o_proj), a
# function that is not linear (the second layer of an MLP), and what reads the same norm as a residual (BERT).
EXPLICIT = {
    "llama": ["o_proj"], "qwen2": ["o_proj"], "gemma3": ["o_proj"], "qwen3_moe": ["o_proj"], "opt": [],
    "gpt2": ["c_proj"], "vit": ["fc2|output.dense"],
    "bert_lm": ["query", "key", "value", "intermediate.dense", "output.dense"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    for record in (SEEN, SAMPLED, FACTORS):
        record.clear()


def compress(model: Any, data: Any, out: Path | None = None, **options: Any) -> Any:
    recipe = Recipe(name="scaled", rules=(Rule(method="scaled_for_tests", ignore=("re:decoder",), options=options),))
    return rarefy.compress(model, recipe, data=data, out=out, device="cpu")


def spread_norms_(model: Any) -> Any:
    """Norms and biases as trained ones are: not all ones and zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def explicit(model: Any, block: str) -> set[str]:
    return {
        name
        for name, module in compressed(model)
        if name.startswith(block) and any("input_scale" in label for label, _ in module.named_buffers())
    }


@pytest.mark.compat
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "opt", "bert_lm", "vit", "qwen3_moe"])
@pytest.mark.parametrize("sequential", [False, True])
def test_the_function_stays(family: str, sequential: bool) -> None:
    model, batches = spread_norms_(family_of(family).build()), batches_for(family_of(family))
    before, moments = logits(model, family), input_moments(wide(model), wide_batches(batches))
    names = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.dim() == 1}
    report = compress(model, batches, true_sequential=sequential)
    assert close(logits(model, family), before.double()) < 1e-4
    # What a recipe is shown when it solves is that of the divided input.
    for name, factor in FACTORS.items():
        if name in SEEN and SEEN[name].weight.dim() == 2:
            divided = moments[name].gram / (factor.double()[:, None] * factor.double())
            assert close(SEEN[name].statistics.gram.sum, divided) < 1e-3, name
            absolute = moments[name].absolute / factor.double()
            assert close(SEEN[name].statistics.columns.absolute, absolute) < 1e-3, name
    assert "power = 0.25 was chosen on 2 layers" in report.notes
    block = next(iter(SEEN)).split("0.")[0] + "0."
    found = explicit(model, block)
    assert len(found) == len(EXPLICIT[family])
    assert all(any(name.endswith(tuple(ends.split("|"))) for name in found) for ends in EXPLICIT[family])
    changed = {name for name, old in names.items() if not torch.equal(model.get_parameter(name), old)}
    assert any("norm" in name.lower() or "ln_" in name for name in changed) == (family != "bert_lm")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_keeps_the_changed_norms(family: str, tmp_path: Path) -> None:
    model = dense_folder(family, tmp_path / "dense")
    with torch.no_grad():
        spread_norms_(model).save_pretrained(tmp_path / "dense")
    before = logits(model, family)
    compress(tmp_path / "dense", batches_for(family_of(family)), tmp_path / "small")
    small = rarefy.load(tmp_path / "small")
    assert close(logits(small, family), before.double()) < 1e-4
    old, new = tensors(tmp_path / "dense"), tensors(tmp_path / "small")
    changed = {name for name in old.keys() & new.keys() if not torch.equal(old[name], new[name])}
    assert changed and all(old[name].dtype == new[name].dtype for name in changed)


def test_samples_are_of_the_dense_model() -> None:
    model, batches = family_of("llama").build(), batches_for(family_of("llama"))
    moments = input_moments(wide(model), wide_batches(batches))
    compress(model, batches)
    assert len(SAMPLED) == 2 and SAMPLED[0].name.split(".")[2] != SAMPLED[1].name.split(".")[2]
    for layer in SAMPLED:
        assert close(layer.statistics.gram.sum, moments[layer.name].gram) < 1e-5


@pytest.mark.parametrize("factor", ["negative", "nan", "short"])
def test_a_factor_that_cannot_be(factor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def give(self: Any, layers: Any) -> torch.Tensor:
        made = torch.ones(layers[0].weight.shape[-1])
        made[0] = {"negative": -1.0, "nan": float("nan"), "short": 1.0}[factor]
        return made[1:] if factor == "short" else made

    monkeypatch.setattr(recipes.ScaledRecipe, "input_scale", give)
    with pytest.raises(RecipeError, match=r"'model\.layers\.0\..*input_scale is not 48 positive finite numbers"):
        compress(family_of("llama").build(), batches_for(family_of("llama")))


def test_gradients_and_input_scales_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes.ScaledRecipe, "needs", frozenset({"columns", "gram", "fisher"}))
    with pytest.raises(RecipeError, match=r"scales inputs, but gradients"):
        compress(family_of("llama").build(), batches_for(family_of("llama")))
