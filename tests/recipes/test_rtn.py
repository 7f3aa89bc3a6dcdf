"""Round to nearest: options become grids, what cannot be is refused, and errors come in the order they must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.contracts import Layer, Recipe, Rule
from rarefy.core.errors import RecipeError
from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LevelGrid, LutGrid
from rarefy.formats.scales import BilevelScale, SingleScale
from rarefy.layers.swap import Site
from rarefy.recipes import load_recipe, presets
from rarefy.recipes.weights.rtn import Rtn
from rarefy.solvers.clip import ClipSearch
from rarefy.solvers.rtn import relative_error, round_to_nearest

HALF = SingleScale(dtype="float16")
GRIDS: list[tuple[dict[str, Any], Grid]] = [
    ({}, IntegerGrid(num_bits=4, group_size=128, zero="integer", scales=HALF)),
    ({"num_bits": 3, "group_size": None}, IntegerGrid(num_bits=3, group_size=None, zero="integer", scales=HALF)),
    ({"symmetric": True, "group_size": 16}, IntegerGrid(num_bits=4, group_size=16, zero="none", scales=HALF)),
    (
        {"zero_point": "float", "group_size": 16, "scales": "bilevel", "num_bits": 3},
        IntegerGrid(num_bits=3, group_size=16, zero="float", scales=BilevelScale(scale_bits=4, zero_bits=4)),
    ),
    ({"format": "nf4", "group_size": 64}, FloatGrid(format="nf4", group_size=64, scales=HALF)),
    ({"format": "fp4", "two_scales": True}, FloatGrid(format="fp4", group_size=128, two_scales=True, scales=HALF)),
    (
        {"format": "fp8_e4m3", "scales": "float32"},
        FloatGrid(format="fp8_e4m3", group_size=128, scales=SingleScale(dtype="float32")),
    ),
    ({"format": "lut", "num_bits": 3, "rows_per_lut": None}, LutGrid(num_bits=3, rows_per_lut=None, dtype="float16")),
    ({"format": "lut", "scales": "bfloat16"}, LutGrid(num_bits=4, rows_per_lut=1, dtype="bfloat16")),
    ({"format": "ternary", "group_size": 64}, LevelGrid(levels=3, group_size=64, scales=HALF)),
    ({"format": "five_level"}, LevelGrid(levels=5, group_size=128, zero="integer", scales=HALF)),
    ({"format": "five_level", "symmetric": True}, LevelGrid(levels=5, group_size=128, zero="none", scales=HALF)),
    ({"format": "binary", "regions": 3, "group_size": 32}, BinaryGrid(regions=3, group_size=32, dtype="float16")),
]


@pytest.fixture
def weight(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(24, 96, generator=generator) * 0.02


@pytest.mark.parametrize(("options", "grid"), GRIDS, ids=[str(options) for options, _ in GRIDS])
def test_options_describe_a_grid(options: dict[str, Any], grid: Grid, weight: torch.Tensor) -> None:
    recipe = load_recipe("rtn", options).rules[0].recipe()
    assert isinstance(recipe, Rtn) and recipe.grid() == grid
    solution = recipe.solve(Layer("layer", weight))
    assert len(solution.terms) == 1 and solution.notes == []
    assert torch.equal(solution.terms[0].decode(), round_to_nearest(weight, grid).decode())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_bits": 0}, "num_bits"),
        ({"num_bits": 9}, "num_bits"),
        ({"group_size": 0}, "group_size"),
        ({"format": "int5"}, "'nf3', 'nf4'"),
        ({"scales": "float8"}, "'bfloat16'"),
        ({"bits": 4}, "'num_bits'"),
        ({"num_bits": 1, "symmetric": True}, "binary"),
        ({"symmetric": True, "zero_point": "float"}, "zero point"),
        ({"format": "nf4", "num_bits": 4}, "'num_bits' has no effect on format 'nf4'"),
        ({"format": "lut", "group_size": 32}, "'group_size' has no effect"),
        ({"format": "lut", "clip": "mse"}, "'clip' has no effect"),
        ({"format": "ternary", "clip": "mse"}, "'clip' has no effect"),
        ({"format": "ternary", "symmetric": True}, "'symmetric' has no effect"),
        ({"format": "binary", "scales": "bilevel"}, "'scales' has no effect"),
        ({"format": "nf4", "two_scales": True, "scales": "bilevel"}, "single"),
        ({"two_scales": True}, "'two_scales' has no effect on format 'int'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_one_sentence(options: dict[str, Any], word: str) -> None:
    with pytest.raises(RecipeError) as failure:
        load_recipe("rtn", options)
    said = str(failure.value)
    assert word in said and "\n" not in said and said.endswith((".", "?"))


def error(weight: torch.Tensor, **options: Any) -> float:
    return relative_error(weight, Rtn(**options).solve(Layer("layer", weight)).terms)


def test_more_bits_mean_less_error(weight: torch.Tensor) -> None:
    errors = [error(weight, num_bits=bits, group_size=32) for bits in range(8, 1, -1)]
    assert errors == sorted(errors) and errors[0] < 0.01 < errors[-1]
    assert error(weight, group_size=16) < error(weight, group_size=96)
    assert error(weight, format="nf4", group_size=32) < error(weight, format="nf3", group_size=32)
    assert error(weight, format="five_level", group_size=32) < error(weight, format="ternary", group_size=32)


def test_a_zero_point_helps_skewed_weights(weight: torch.Tensor) -> None:
    skewed = weight.abs() ** 1.5 + 0.001
    for bits in (3, 4, 8):
        plain = error(skewed, num_bits=bits, group_size=32, symmetric=True)
        for zero in ("integer", "float"):
            assert error(skewed, num_bits=bits, group_size=32, zero_point=zero) <= plain


@pytest.mark.parametrize(
    "options",
    [{"num_bits": 3}, {"num_bits": 4, "symmetric": True}, {"format": "nf4"}, {"format": "five_level"}],
    ids=str,
)
def test_clipping_never_raises_what_it_searches(options: dict[str, Any], weight: torch.Tensor) -> None:
    weight = weight.clone()
    weight[::5, 7] *= 8
    plain, clipped = (
        (weight - Rtn(**options, group_size=32, clip=clip).solve(Layer("layer", weight)).terms[0].decode()).abs()
        for clip in ("none", "mse")
    )
    groups = [difference.reshape(24, 3, 32).double().pow(ClipSearch().norm).sum(-1) for difference in (plain, clipped)]
    assert (groups[1] <= groups[0] * (1 + 1e-4)).all() and groups[1].sum() < groups[0].sum()


def test_experts_are_solved_one_by_one(generator: torch.Generator) -> None:
    stacked = torch.randn(3, 8, 32, generator=generator)
    recipe = Rtn(num_bits=4, group_size=16, clip="mse")
    together = recipe.solve(Layer("experts", stacked)).terms[0].decode()
    assert torch.equal(together, torch.stack([recipe.solve(Layer("one", one)).terms[0].decode() for one in stacked]))


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_load_and_take_options(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and all(isinstance(rule.recipe(), Rtn) for rule in recipe.rules)
    changed = load_recipe(name, {"group_size": 32})
    assert all(rule.options["group_size"] == 32 for rule in changed.rules)


def test_an_object_is_taken_as_it_is() -> None:
    recipe = Recipe(name="own", rules=(Rule(method="rtn", options={"num_bits": 5}),))
    assert load_recipe(recipe) is recipe
    with pytest.raises(RecipeError, match="Unknown recipe 'rtm'"):
        load_recipe(Recipe(name="own", rules=(Rule(method="rtm"),)))


BAD_FILES = {
    "not yaml": ("rules: [", "line"),
    "a list": ("- rtn", "dictionary"),
    "empty": ("", "None"),
    "no rules": ("name: x", "rules"),
    "empty rules": ("rules: []", "rules"),
    "unknown key": ("rules: [{method: rtn}]\nrule: 1", "did you mean 'rules'?"),
    "unknown key of a rule": ("rules: [{method: rtn, option: {}}]", "option"),
    "unknown method": ("rules: [{method: rtm}]", "did you mean 'rtn'?"),
    "unknown option": ("rules: [{method: rtn, options: {bits: 3}}]", "num_bits"),
    "bad target": ("rules: [{method: rtn, targets: [Linear, 're:(']}]", "regular expression"),
    "bad ignore": ("rules: [{method: rtn, ignore: ['re:*']}]", "regular expression"),
    "python object": ("rules: !!python/object/apply:os.getcwd []", "YAML"),
    "date that is none": ("name: 2026-13-45", "YAML"),
}


@pytest.mark.parametrize(("content", "word"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_by_one_sentence(content: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(RecipeError) as failure:
        load_recipe(tmp_path / "mine.yaml")
    assert word in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["none.yaml", "none.yml", "none.py", "none.toml", "a/b", "nonsense", ""])
def test_a_missing_recipe(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as failure:
        load_recipe(name and str(tmp_path / name) if "." in name else name)
    assert (name or "Unknown recipe") in str(failure.value) and "\n" not in str(failure.value)


def test_a_folder_or_bytes_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("folder.yaml", "bytes.yaml"):
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(tmp_path / name)


def test_the_first_rule_that_covers_a_layer_applies_and_ignore_wins(tmp_path: Path) -> None:
    (tmp_path / "mixed.yaml").write_text(
        "rules:\n"
        "  - {method: rtn, targets: ['re:.*down_proj$'], ignore: ['l.1.down_proj'], options: {num_bits: 6}}\n"
        "  - {method: rtn, ignore: ['re:l\\.2\\.'], options: {num_bits: 4}}\n"
    )
    recipe = load_recipe(tmp_path / "mixed.yaml")
    assert recipe.name == "mixed"

    def bits(name: str) -> int | None:
        rule = recipe.rule_of(Site(name, "linear", (4, 4), f"{name}.weight"))
        return None if rule is None else rule.options["num_bits"]

    assert bits("l.0.down_proj") == 6
    assert bits("l.1.down_proj") == 4
    assert bits("l.2.down_proj") == 6
    assert bits("l.2.up_proj") is None
    assert bits("l.3.up_proj") == 4


# Recipes in a file of Python

HEAD = "from rarefy.contracts import Solution, WeightRecipe, weight_recipes\n"


def test_a_file_may_use_any_type_for_its_options(tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(
        "from __future__ import annotations\nfrom typing import Literal\n" + HEAD
        + "@weight_recipes.register('test_typed')\nclass Typed(WeightRecipe):\n"
        "    mode: Literal['a', 'b'] = 'a'\n"
        "    def solve(self, layer):\n        return Solution([])\n"
    )  # fmt: skip
    for _ in range(2):  # a second time, as in a session that compresses twice
        recipe = load_recipe(tmp_path / "typed.py", {"mode": "b"})
        assert recipe.name == "test_typed"
    with pytest.raises(RecipeError, match="mode"):
        load_recipe(tmp_path / "typed.py", {"mode": "c"})


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("def broken(:", "SyntaxError"),
        ("import no_such_module_anywhere", "no_such_module_anywhere"),
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", "registers 0"),
        (HEAD + "@weight_recipes.register('rtn')\nclass Mine(WeightRecipe):\n    pass\n", "already registered"),
    ],
    ids=["syntax", "import", "failure", "none", "taken name"],
)
def test_a_file_that_registers_nothing(content: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(RecipeError) as failure:
        load_recipe(tmp_path / "mine.py")
    assert word in str(failure.value) and "\n" not in str(failure.value)


def test_a_broken_package_does_not_take_the_others_along(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from importlib.metadata import EntryPoint

    import rarefy.recipes as recipes

    broken = EntryPoint("mine", "no_such_module_anywhere", recipes.ENTRY_POINTS)
    told: list[str] = []
    monkeypatch.setattr(recipes, "entry_points", lambda group: [broken])
    monkeypatch.setattr(recipes.log, "warning", lambda message, *values: told.append(message % values))
    assert load_recipe("rtn").name == "rtn"
    assert len(told) == 1 and "no_such_module_anywhere" in told[0]
