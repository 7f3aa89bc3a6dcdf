"""Recipes of tables, outliers, two scales and groups: what they must beat, on every kind of model, through storage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rarefy
from rarefy.contracts import Layer, Solution, WeightRecipe
from rarefy.core.errors import RecipeError
from rarefy.formats.terms import Quantized
from rarefy.recipes import load_recipe
from rarefy.recipes.weights.afpq import Afpq
from rarefy.recipes.weights.gptq import Gptq
from rarefy.recipes.weights.gqsa import Gqsa
from rarefy.recipes.weights.gwq import Gwq
from rarefy.recipes.weights.rtn import Rtn
from rarefy.recipes.weights.sparsegpt import SparseGpt
from rarefy.recipes.weights.squeeze_llm import SqueezeLlm
from rarefy.statistics import ColumnMoments, Fisher, Gradient, Statistics
from tests.recipes.test_calibrated import compress
from tests.solvers.problems import output_error, problem
from tests.zoo import FAMILIES, logits, same_bytes, tensors

PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "squeeze_llm": ("squeeze_llm", {"magnitude_share": 0.02}),
    "squeeze_llm shared, feedback": ("squeeze_llm", {"rows_per_lut": 4, "feedback": True}),
    "gwq": ("gwq", {"num_bits": 3, "group_size": 16}),
    "gwq feedback": ("gwq", {"num_bits": 3, "group_size": 16, "feedback": True, "saliency": "fisher", "clip": "mse"}),
    "afpq": ("afpq", {"group_size": 16}),
    "afpq awq": ("afpq", {"group_size": 16, "format": "fp3", "solver": "awq"}),
    "gqsa": ("gqsa", {"index": "ids", "scales": "float16", "sparsity": 0.3}),
    "gqsa fisher": ("gqsa", {"rows": "fisher"}),
}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "bert_labels", "vit"])
@pytest.mark.parametrize("name", PLANS)
def test_stored_and_loaded_it_is_the_same(family: str, name: str, tmp_path: Path) -> None:
    model, report = compress(family, *PLANS[name], out=tmp_path / "out")
    loaded = FAMILIES[family].model_class.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, family), logits(model, family))
    rarefy.save(loaded, tmp_path / "again")
    assert same_bytes(tensors(tmp_path / "out"), tensors(tmp_path / "again"))
    assert report.layers and all((layer.output_error or layer.relative_error) < 0.8 for layer in report.layers)
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors(tmp_path / "out").values())


def layer_of(rows: int = 48, columns: int = 128, seed: int = 0) -> Layer:
    """A layer with everything known of it; its gradients are those of one output error per sequence."""
    weight, x, gram = problem(rows, columns, seed=seed)
    moments, fisher, gradient = ColumnMoments(columns), Fisher((rows, columns)), Gradient((rows, columns))
    moments.update(x)
    generator = torch.Generator().manual_seed(seed)
    for number, tokens in enumerate(x.split(16)):
        upstream = torch.randn(len(tokens), rows, generator=generator) * torch.logspace(-1, 1, rows)
        fisher.update(upstream.T @ tokens)
        if not number:
            gradient.update(upstream.T @ tokens)
    return Layer("layer", weight, Statistics(gram=gram, columns=moments, fisher=fisher, gradient=gradient))


def stored(solution: Solution) -> Tensor:
    return torch.stack([term.decode() for term in solution.terms]).sum(0)


def bits(solution: Solution) -> float:
    return sum(term.byte_count().total for term in solution.terms) * 8 / math.prod(solution.terms[0].shape)


def sensitive_error(recipe: WeightRecipe, layer: Layer) -> float:
    """The loss that Fisher information foresees."""
    assert layer.statistics.fisher is not None
    return float((layer.statistics.fisher.mean() * (stored(recipe.solve(layer)) - layer.weight).square()).sum())


def lost(recipe: WeightRecipe, layer: Layer) -> float:
    assert layer.statistics.gram is not None
    return output_error(layer.weight, stored(recipe.solve(layer)), layer.statistics.gram)


# ---- tables where the loss is sensitive


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_no_row_of_even_steps_is_as_good_as_its_table(num_bits: int) -> None:
    layer = layer_of()
    dense = {"sensitive_share": 0.0, "magnitude_share": 0.0, "num_bits": num_bits}
    table = sensitive_error(SqueezeLlm(**dense), layer)
    for clip in ("none", "mse"):
        assert table < sensitive_error(Rtn(num_bits=num_bits, group_size=None, clip=clip), layer)  # type: ignore[arg-type]
    assert table < sensitive_error(SqueezeLlm(**dense, importance="equal"), layer)
    assert table > sensitive_error(SqueezeLlm(num_bits=num_bits), layer)


def test_outliers_are_the_wanted_number_and_what_a_table_costs_is_shared() -> None:
    layer = layer_of()
    solution = SqueezeLlm(sensitive_share=0.01, magnitude_share=0.02).solve(layer)
    outliers = solution.terms[1].decode().ne(0)
    assert int(outliers.sum()) == round(0.01 * 6144) + round(0.02 * 6144)
    assert layer.statistics.fisher is not None
    assert bool(outliers.flatten()[layer.statistics.fisher.sum.argmax()])
    assert bool(outliers.flatten()[layer.weight.abs().argmax()])
    dense = {"sensitive_share": 0.0, "magnitude_share": 0.0}
    own, shared, single = (bits(SqueezeLlm(**dense, rows_per_lut=rows).solve(layer)) for rows in (1, 8, None))
    assert own == 4.0 and shared == 3.125 and single == pytest.approx(3 + 8 * 16 / 6144)


def test_feedback_lowers_the_output_error() -> None:
    layer = layer_of()
    for plain, feedback in (
        (SqueezeLlm(), SqueezeLlm(feedback=True)),
        (Gwq(num_bits=3, group_size=16), Gwq(num_bits=3, group_size=16, feedback=True)),
    ):
        assert lost(feedback, layer) < 0.8 * lost(plain, layer)
        assert bits(feedback.solve(layer)) == bits(plain.solve(layer))


# ---- outliers by gradient


@pytest.mark.parametrize("saliency", ["gradient", "taylor", "fisher", "hessian", "magnitude", "random"])
def test_each_saliency_protects_what_it_names(saliency: str) -> None:
    layer = layer_of()
    recipe = Gwq(saliency=saliency, outlier_share=0.05)  # type: ignore[arg-type]
    outliers = recipe.solve(layer).terms[1].decode().ne(0)
    assert int(outliers.sum()) == pytest.approx(0.05 * 6144, abs=1)
    known = layer.statistics
    assert known.gradient is not None and known.fisher is not None and known.gram is not None
    scores = {
        "gradient": known.gradient.sum.abs(),
        "taylor": (known.gradient.sum * layer.weight).abs(),
        "fisher": known.fisher.sum,
        "magnitude": layer.weight.abs(),
        "hessian": layer.weight.square() * known.gram.mean().diagonal(),
    }
    if saliency == "random":
        assert all(float(score[outliers].mean()) < 1.5 * float(score.mean()) for score in scores.values())
    elif saliency == "hessian":
        assert float(scores["hessian"][outliers].mean()) > 5 * float(scores["hessian"].mean())
    else:
        assert float(scores[saliency][outliers].min()) >= float(scores[saliency][~outliers].max())


def test_outliers_by_gradient_beat_random_ones_where_the_loss_is_sensitive() -> None:
    """At equal bits. On models: see the benchmark's plans."""
    layer = layer_of()
    options: dict[str, Any] = {"num_bits": 3, "group_size": 32, "outlier_share": 0.02}
    errors = {name: sensitive_error(Gwq(**options, saliency=name), layer) for name in ("gradient", "fisher", "random")}
    assert errors["fisher"] < errors["gradient"] < 0.9 * errors["random"]


def test_experts_without_a_gradient_keep_their_largest_weights() -> None:
    weight = torch.stack([problem(16, 32, seed=seed)[0] for seed in range(2)])
    gradient = Gradient((2, 16, 32))
    gradient.update(torch.stack([torch.randn(16, 32), torch.zeros(16, 32)]))
    gradient.assume_uniform_()
    layer = Layer("experts", weight, Statistics(gradient=gradient))
    [_, residual] = Gwq(group_size=16, outlier_share=0.05).solve(layer).terms
    own = residual.select(1).decode().ne(0)
    assert float(weight[1].abs()[own].min()) >= float(weight[1].abs()[~own].max())


# ---- a scale for each sign


@pytest.mark.parametrize("name", ["fp3", "fp4", "nf3", "nf4"])
@pytest.mark.parametrize("solver", ["rtn", "gptq", "awq"])
def test_two_scales_beat_one(name: str, solver: str) -> None:
    layer = layer_of()
    skewed = Layer("layer", torch.where(layer.weight > 0, 1.6, 1.0) * layer.weight, layer.statistics)
    two = Afpq(format=name, group_size=32, solver=solver)  # type: ignore[arg-type]
    grid = {"format": name, "group_size": 32, "two_scales": False}
    one = type(two.base())(**grid)  # type: ignore[arg-type]
    assert lost(two, skewed) < lost(one, skewed)
    assert bits(two.solve(skewed)) == bits(one.solve(skewed)) + 0.5


def test_afpq_wants_what_its_solver_wants() -> None:
    assert Afpq(solver="rtn").needs == frozenset()
    assert Afpq(solver="gptq").needs == Gptq().needs
    recipe = Afpq(solver="gptq", solver_options={"true_sequential": True, "clip": "none"})
    assert recipe.schedule().true_sequential
    assert recipe.base().search() is None


# ---- groups


def test_groups_of_integers_take_fewer_bits_than_pairs_of_four_and_two_bits() -> None:
    """What they cost by selection, by rounds, and by sparsity."""
    layer = layer_of(96, 256)
    uneven = Layer("layer", layer.weight * torch.logspace(-0.5, 0.5, 96)[:, None], layer.statistics)
    solution = Gqsa().solve(uneven)
    for other in (SparseGpt(n=2, m=4, num_bits=4), Gptq(num_bits=2, group_size=16)):
        assert bits(solution) < bits(other.solve(uneven))
    assert lost(Gqsa(), uneven) < lost(Gqsa(saliency="mean", rounds=1), uneven)
    assert sensitive_error(Gqsa(rows="fisher"), uneven) < 0.9 * sensitive_error(Gqsa(rows="equal"), uneven)
    costs = [lost(Gqsa(sparsity=sparsity), uneven) for sparsity in (0.2, 0.3, 0.4, 0.5)]
    assert costs == sorted(costs)
    (term,) = solution.terms
    assert isinstance(term, Quantized) and int(term.decode().eq(0).sum()) >= term.decode().numel() // 2


def test_the_smaller_the_groups_the_less_half_of_them_costs() -> None:
    """Pairs of four lie between groups of 2 and of 16."""
    layer = layer_of(96, 256)
    costs = [lost(Gqsa(num_bits=None, group_size=size), layer) for size in (2, 4, 8, 16)]
    assert costs == sorted(costs)
    assert costs[0] < lost(SparseGpt(n=2, m=4), layer) < costs[-1]


# ---- what is missing or wrong


def test_without_statistics_layers_are_solved_without_data() -> None:
    weight = problem(16, 32)[0]
    recipes: list[WeightRecipe] = [
        SqueezeLlm(feedback=True), Gwq(group_size=16, feedback=True), Gwq(saliency="taylor"), Gwq(saliency="hessian"),
        Afpq(), Gqsa(),
        Gqsa(rows="fisher"),
    ]  # fmt: skip
    for layer in (Layer("layer", weight), Layer("experts", torch.stack([weight, 2 * weight]))):
        for recipe in recipes:
            solution = recipe.solve(layer)
            assert stored(solution).shape == layer.weight.shape
            said = "".join(solution.notes)
            assert ("not known" in said) == bool(recipe.needs & {"fisher", "gradient"})


def test_recipes_want_no_more_than_their_options_use() -> None:
    for recipe, options, needs in (
        ("squeeze_llm", {}, {"fisher"}),
        ("squeeze_llm", {"feedback": True}, {"fisher", "gram"}),
        ("squeeze_llm", {"importance": "equal", "sensitive_share": 0}, set()),
        ("gwq", {}, {"gradient"}),
        ("gwq", {"saliency": "magnitude"}, set()),
        ("gwq", {"saliency": "hessian", "feedback": True}, {"gram"}),
        ("gqsa", {}, {"gram"}),
        ("gqsa", {"rows": "fisher"}, {"gram", "fisher"}),
    ):
        assert load_recipe(recipe, options).rules[0].recipe().needs == needs


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("afpq", {"solver_options": {"format": "int"}}, "'format' describes the grid"),
        ("afpq", {"solver": "rtn", "solver_options": {"act_order": True}}, "'act_order' is not an option"),
        ("afpq", {"format": "fp8_e4m3"}, "format"),
        ("squeeze_llm", {"sensitive_share": 0.5}, "sensitive_share"),
        ("gwq", {"saliency": "gradients"}, "saliency"),
        ("gqsa", {"index": "ids", "rows": "equal"}, "'ids' stores equally many"),
        ("gqsa", {"num_bits": None, "clip": "mse"}, "'clip' has no effect on 16-bit values"),
        ("gqsa", {"scales": "float16", "scale_rows": 8}, "'scale_rows' has no effect"),
    ],
)
def test_bad_options_are_refused_by_name(recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, options)
