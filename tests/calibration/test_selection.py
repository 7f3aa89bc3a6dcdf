"""Which layers a recipe means: targets, ignore, patterns, heads and routers, shared weights, experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rarefy.calibration.selection import may_be_absent, select, tied_parameters
from rarefy.contracts import Recipe, Rule
from rarefy.core.errors import RecipeError
from rarefy.layers.swap import sites
from tests.zoo import FAMILIES


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gate = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.router = nn.Linear(8, 2)
        self.lm_head = nn.Linear(8, 12, bias=False)


def rule(*targets: str, ignore: tuple[str, ...] = (), **options: Any) -> Rule:
    return Rule(method="rtn", targets=targets or ("Linear",), ignore=ignore, options=options)


def chosen(*rules: Rule, model: nn.Module | None = None) -> list[str]:
    return [site.name for site, _ in select(model or Toy(), Recipe(name="test", rules=rules)).chosen]


BODY = [f"layers.{index}.{part}" for index in (0, 1) for part in ("up", "down")]


def test_linear_means_all_but_heads_and_routers() -> None:
    selection = select(Toy(), Recipe(name="test", rules=(rule(),)))
    assert [site.name for site, _ in selection.chosen] == BODY
    assert selection.skipped == {
        "layers.0.gate": "router", "layers.1.gate": "router", "router": "router", "lm_head": "output head",
    }  # fmt: skip


def test_exact_names_and_patterns() -> None:
    assert chosen(rule("layers.1.up")) == ["layers.1.up"]
    assert chosen(rule("re:layers\\.0")) == ["layers.0.up", "layers.0.down", "layers.0.gate"]
    assert chosen(rule("re:.*up$")) == ["layers.0.up", "layers.1.up"]
    with pytest.raises(RecipeError, match="No layer of this model is covered"):
        chosen(rule("re:up"))  # patterns are matched from the start of a name


def test_heads_and_routers_when_they_are_named() -> None:
    assert chosen(rule("Linear", "lm_head")) == [*BODY, "lm_head"]
    assert chosen(rule("Linear", "re:.*gate")) == [
        "layers.0.up", "layers.0.down", "layers.0.gate", "layers.1.up", "layers.1.down", "layers.1.gate",
    ]  # fmt: skip
    assert chosen(rule("router")) == ["router"]
    assert chosen(rule("re:.*")) == [*(site.name for site in sites(Toy()))]


def test_ignore_wins() -> None:
    assert chosen(rule(ignore=("layers.0.up",))) == BODY[1:]
    assert chosen(rule(ignore=("re:.*down",))) == [name for name in BODY if not name.endswith("down")]
    assert chosen(rule("layers.0.up", "layers.1.up", ignore=("layers.0.up",))) == ["layers.1.up"]
    with pytest.raises(RecipeError, match="No layer"):
        chosen(rule(ignore=("Linear",)))


def test_the_first_rule_that_covers_a_layer_applies() -> None:
    first, second = rule("re:layers\\.0", ignore=("re:.*gate",), num_bits=2), rule(num_bits=8)
    found = {site.name: used for site, used in select(Toy(), Recipe(name="two", rules=(first, second))).chosen}
    assert {name: used.options["num_bits"] for name, used in found.items()} == {
        "layers.0.up": 2, "layers.0.down": 2, "layers.1.up": 8, "layers.1.down": 8,
    }  # fmt: skip
    skipped = select(Toy(), Recipe(name="few", rules=(rule("layers.0.up"),))).skipped
    assert skipped["layers.1.down"] == "no rule covers it"


@pytest.mark.parametrize("name", ["layers.0.upp", "embed", "layers.0", "linear", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"Target '{name}' is not a linear layer"):
        chosen(rule("Linear", name))


@pytest.mark.parametrize("pattern", ["re:(", "re:[", "re:*a"])
def test_bad_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match="is not a regular expression"):
        chosen(rule(pattern))


def test_shared_weights_stay_dense() -> None:
    """Compressing one of two layers that are one would leave the other without weights in the file."""
    model = Toy()
    model.layers[1].up = model.layers[0].up  # one module under two names
    model.layers[1].down.weight = model.layers[0].down.weight  # two modules with one parameter
    selection = select(model, Recipe(name="test", rules=(rule("re:layers.*"),)))
    assert [site.name for site, _ in selection.chosen] == ["layers.0.gate", "layers.1.gate"]
    assert selection.skipped["layers.0.up"] == "shares its weight with 'layers.1.up.weight'"
    assert selection.skipped["layers.1.down"] == "shares its weight with 'layers.0.down.weight'"
    with pytest.raises(RecipeError, match=r"'layers\.0\.up' shares its weight"):
        chosen(rule("layers.0.up"), model=model)


def test_tied_parameters() -> None:
    model = Toy()
    model.lm_head.weight = model.embed.weight
    assert tied_parameters(model) == {"lm_head.weight": "embed.weight"}
    assert may_be_absent(model) == {"lm_head.weight"}
    assert may_be_absent(Toy()) == set()
    llama = FAMILIES["llama_tied"].build()
    assert tied_parameters(llama) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert may_be_absent(FAMILIES["llama"].build()) == set()
    t5 = FAMILIES["t5"].build()
    assert set(tied_parameters(t5).values()) == {"shared.weight"}


@pytest.mark.compat
@pytest.mark.parametrize(("family", "count"), [("llama", 15), ("gpt2", 9), ("qwen3_moe", 13), ("bert_labels", 14)])
def test_sites_of_real_models_need_no_memory(family: str, count: int) -> None:
    with torch.device("meta"):
        model = FAMILIES[family].model_class(FAMILIES[family].build().config)
    found = list(sites(model))
    assert len(found) == count
    kinds = {site.kind for site in found}
    assert kinds == {"llama": {"linear"}, "gpt2": {"linear", "conv1d"}, "qwen3_moe": {"linear", "experts"}}.get(
        family, {"linear"}
    )
    for site in found:
        stored = tuple(model.get_parameter(site.parameter).shape)
        assert stored == (site.shape[::-1] if site.kind == "conv1d" else site.shape)
        assert site.count == model.get_parameter(site.parameter).numel()
