"""Recipes that calibrate: they lose less than rounding or pruning alone, on every kind of model, stored or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rarefy
from rarefy.calibration.report import CompressionReport
from rarefy.contracts import Layer
from rarefy.core.errors import RecipeError
from rarefy.recipes import load_recipe
from rarefy.recipes.weights.awq import Awq
from rarefy.recipes.weights.gptq import Gptq
from rarefy.recipes.weights.sparsegpt import SparseGpt
from rarefy.recipes.weights.spqr import Spqr
from rarefy.recipes.weights.wanda import Wanda
from rarefy.statistics import ColumnMoments, Statistics
from tests.solvers.problems import output_error, problem
from tests.zoo import FAMILIES, VOCABULARY, logits, same_bytes, tensors

# Recipe, its options, and the data-free or simpler one that it must beat in output error at the same layout.
PLANS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "gptq": ("gptq", {"num_bits": 3, "group_size": 16}, "rtn", {"num_bits": 3, "group_size": 16}),
    "gptq in found order": (
        "gptq",
        {"num_bits": 3, "group_size": 16, "static_groups": False},
        "rtn",
        {"num_bits": 3, "group_size": 16},
    ),
    "gptq lut": ("gptq", {"format": "lut", "num_bits": 3}, "rtn", {"format": "lut", "num_bits": 3}),
    "gptq true-sequential": (
        "gptq",
        {"num_bits": 3, "group_size": 16, "true_sequential": True},
        "rtn",
        {"num_bits": 3, "group_size": 16},
    ),
    "awq": ("awq", {"num_bits": 3, "group_size": 16}, "rtn", {"num_bits": 3, "group_size": 16}),
    "spqr": ("spqr", {"dampening": 0.1}, "rtn", {"num_bits": 3, "group_size": 16, "zero_point": "float"}),
    "sparsegpt": ("sparsegpt", {}, "wanda", {}),
    "sparsegpt 2:4 int4": (
        "sparsegpt",
        {"n": 2, "m": 4, "num_bits": 4, "group_size": 16},
        "wanda",
        {"n": 2, "m": 4, "num_bits": 4, "group_size": 16},
    ),
}


def inputs(family: str) -> Any:
    """Calibration batches of a family."""
    generator = torch.Generator().manual_seed(5)
    if FAMILIES[family].eats == "pixels":
        return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)} for _ in range(4)]
    return torch.randint(3, VOCABULARY, (24, 30), generator=generator)


def compress(family: str, recipe: str, options: dict[str, Any], **where: Any) -> tuple[Any, CompressionReport]:
    model = FAMILIES[family].build()
    return model, rarefy.compress(model, recipe, options=options, data=inputs(family), **where)


def mean_error(report: CompressionReport) -> float:
    errors = [layer.output_error for layer in report.layers]
    assert None not in errors
    return sum(errors) / len(errors)  # type: ignore[arg-type]


def output_errors_of(family: str, recipe: str, options: dict[str, Any]) -> float:
    """Mean output error of a simpler recipe: its codes, judged by the Gram matrices that gptq reports on."""
    dense, simple = FAMILIES[family].build(), FAMILIES[family].build()
    rarefy.compress(simple, recipe, options=options, data=inputs(family) if recipe != "rtn" else None)
    with torch.no_grad():
        seen: dict[str, list[float]] = {}

        def watch(name: str, module: torch.nn.Module) -> Any:
            def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
                exact = torch.nn.functional.linear(args[0], dense.get_submodule(name).weight, module.bias)
                plain = exact if module.bias is None else exact - module.bias
                seen.setdefault(name, []).append(float((out - exact).norm() / plain.norm()))

            return hook

        from rarefy.layers.swap import compressed

        handles = [module.register_forward_hook(watch(name, module)) for name, module in compressed(simple)]
        simple(input_ids=inputs(family))
        for handle in handles:
            handle.remove()
    return sum(sum(values) / len(values) for values in seen.values()) / len(seen)


@pytest.mark.parametrize("name", PLANS)
def test_loses_less_than_what_it_builds_on(name: str) -> None:
    recipe, options, simpler, their_options = PLANS[name]
    _, report = compress("llama", recipe, options)
    assert mean_error(report) < (0.95 if name == "awq" else 0.9) * output_errors_of("llama", simpler, their_options)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "bert_labels", "vit"])
@pytest.mark.parametrize("name", ["gptq", "awq", "spqr", "sparsegpt 2:4 int4", "sparsegpt"])
def test_stored_and_loaded_it_is_the_same(family: str, name: str, tmp_path: Path) -> None:
    recipe, options, _, _ = PLANS[name]
    model, report = compress(family, recipe, options, out=tmp_path / "out")
    loaded = FAMILIES[family].model_class.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, family), logits(model, family))
    rarefy.save(loaded, tmp_path / "again")
    assert same_bytes(tensors(tmp_path / "out"), tensors(tmp_path / "again"))
    assert report.layers and all(layer.output_error is not None for layer in report.layers)
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors(tmp_path / "out").values())


def test_scales_are_folded_so_that_the_function_stays() -> None:
    """Scaling alone, at 8 bits, changes next to nothing; at 3 bits it wins over rounding where inputs are uneven."""
    dense = FAMILIES["llama"].build()
    with torch.no_grad():
        for block in dense.model.layers:
            block.input_layernorm.weight[::7] *= 20
            block.post_attention_layernorm.weight[::5] *= 20
    exact = logits(dense, "llama")
    errors = {}
    for recipe, options in (("awq", {"num_bits": 8}), ("awq", {"num_bits": 3}), ("rtn", {"num_bits": 3})):
        model = FAMILIES["llama"].build()
        model.load_state_dict(dense.state_dict())
        rarefy.compress(
            model, recipe, options={**options, "group_size": 16}, data=inputs("llama") if recipe == "awq" else None
        )
        errors[recipe, options["num_bits"]] = float((logits(model, "llama") - exact).norm() / exact.norm())
    assert errors["awq", 8] < 0.02
    assert errors["awq", 3] < 0.8 * errors["rtn", 3]


def layer_of(rows: int = 32, columns: int = 64) -> Layer:
    weight, x, gram = problem(rows, columns)
    moments = ColumnMoments(columns)
    moments.update(x)
    return Layer("layer", weight, Statistics(gram=gram, columns=moments))


def stored(recipe: Any, layer: Layer) -> torch.Tensor:
    return torch.stack([term.decode() for term in recipe.solve(layer).terms]).sum(0)


def test_clipping_by_output_error_lowers_it() -> None:
    layer = layer_of()
    gram = layer.statistics.gram
    assert gram is not None
    options = {"num_bits": 3, "group_size": 16}
    searched, plain = (stored(Awq(clip=clip, **options), layer) for clip in ("output", "none"))  # type: ignore[arg-type]
    assert output_error(layer.weight, searched, gram) < output_error(layer.weight, plain, gram)
    query = Layer("model.layers.0.self_attn.q_proj", layer.weight, layer.statistics)
    assert torch.equal(stored(Awq(**options), query), plain)


def test_target_bits_are_met() -> None:
    layers = [layer_of(128, 256) for _ in range(2)]
    with pytest.raises(RecipeError, match=r"target_bits 3.9 cannot be met: without any outlier a weight takes 4\.000"):
        Spqr(target_bits=3.9, dampening=0.1).prepare(layers)
    for target in (4.2, 4.5):
        decided = Spqr(target_bits=target, dampening=0.1).prepare(layers)
        assert decided.target_bits is None
        terms = [term for layer in layers for term in decided.solve(layer).terms]
        bits = sum(term.byte_count().total for term in terms) * 8 / sum(layer.weight.numel() for layer in layers)
        assert bits == pytest.approx(target, abs=0.02)


def test_pruning_keeps_what_it_says() -> None:
    layer = layer_of()
    for recipe in (Wanda(sparsity=0.25), SparseGpt(sparsity=0.25)):
        assert int((stored(recipe, layer) == 0).sum()) == layer.weight.numel() // 4
    for recipe in (Wanda(n=1, m=4), SparseGpt(n=1, m=4)):
        zeros = (stored(recipe, layer) == 0).unflatten(1, (-1, 4)).sum(-1)
        assert bool((zeros == 3).all())


def test_without_statistics_layers_are_solved_without_data() -> None:
    weight = problem(16, 32)[0]
    for recipe in (Gptq(group_size=16), Awq(group_size=16), Spqr(), SparseGpt(), Wanda(num_bits=4, group_size=16)):
        assert stored(recipe, Layer("layer", weight)).shape == weight.shape


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("wanda", {"n": 2}, "'n' and 'm' go together"),
        ("wanda", {"n": 4, "m": 4}, "drops nothing"),
        ("sparsegpt", {"n": 2, "m": 4, "sparsity": 0.5}, "'sparsity' has no effect"),
        ("sparsegpt", {"group_size": 32}, "'group_size' has no effect"),
        ("gptq", {"format": "nf4", "num_bits": 4}, "'num_bits' has no effect"),
        ("gptq", {"dampening": 0}, "dampening"),
        ("awq", {"clip": "best"}, "clip"),
        ("spqr", {"group_size": 1}, "group_size"),
    ],
)
def test_bad_options_are_refused_by_name(recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, options)
