"""What the pages show works: the example recipe from file to loaded model, and the snippets of the pages."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import rarefy
from rarefy.contracts import Layer, Recipe
from rarefy.core.config import parse
from rarefy.core.errors import OptionError, RecipeError
from rarefy.evaluation.efficiency.matrix import Matrix
from rarefy.recipes import load_recipe
from rarefy.recipes.weights.rtn import Rtn
from rarefy.solvers.rtn import relative_error
from tests.zoo import dense_folder

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "outlier_rtn.py"
PAGES = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LOAD = """
import sys, torch, transformers, rarefy
transformers.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any("outlier" in name for name in sys.modules), "the recipe's file was imported"
torch.save(model(torch.arange(3, 20)[None]).logits.detach(), sys.argv[2])
"""


def snippets(language: str) -> list[tuple[str, str]]:
    return [
        (path.name, body) for path in PAGES for kind, body in FENCE.findall(path.read_text("utf-8")) if kind == language
    ]


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text("utf-8").splitlines()) < 60


def test_the_example_corrects_outliers(generator: torch.Generator) -> None:
    weight = torch.randn(48, 256, generator=generator) * 0.02
    spikes = torch.randperm(weight.numel(), generator=generator)[: weight.numel() // 200]
    weight.view(-1)[spikes] *= 20
    own = load_recipe(EXAMPLE, {"num_bits": 3}).rules[0].recipe().solve(Layer("layer", weight))
    plain = Rtn(num_bits=3).solve(Layer("layer", weight))
    assert relative_error(weight, own.terms) < relative_error(weight, plain.terms) / 2
    assert len(own.terms) == 2 and own.notes == []
    largest = weight.abs().flatten().topk(round(0.005 * weight.numel())).indices
    whole = sum(term.decode() for term in own.terms)
    assert torch.allclose(whole.flatten()[largest], weight.flatten()[largest], rtol=2e-3)


def test_a_model_compressed_by_the_example_loads_without_it(tmp_path: Path) -> None:
    dense_folder("llama", tmp_path / "dense")
    report = rarefy.compress(
        tmp_path / "dense", EXAMPLE, options={"group_size": 16, "outliers": 0.02}, out=tmp_path / "small", device="cpu"
    )
    assert report.recipe == "outlier_rtn" and report.bits_per_weight["indices"] > 0 and not report.fallbacks
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    given = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "logits.pt")]
    done = subprocess.run(given, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    here = rarefy.load(tmp_path / "small")(torch.arange(3, 20)[None]).logits
    assert torch.allclose(logits, here, atol=1e-5)  # the processes may differ in their number of threads


@pytest.mark.parametrize(("page", "body"), snippets("python"), ids=lambda value: value[:12].replace("\n", " "))
def test_python_on_the_pages_is_python(page: str, body: str) -> None:
    tree = ast.parse(body)
    for node in ast.walk(tree):  # what is called on the package exists
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rarefy":
            assert hasattr(rarefy, node.attr), f"{page}: rarefy.{node.attr}"


@pytest.mark.parametrize(("page", "body"), snippets("yaml"), ids=lambda value: value[:12].replace("\n", " "))
def test_yaml_on_the_pages_is_a_recipe_or_a_matrix(page: str, body: str) -> None:
    options = yaml.safe_load(body)
    if "models" in options:
        assert parse(Matrix, options, page, OptionError).models
        return
    recipe = parse(Recipe, {"name": page, **options}, page, RecipeError)
    assert load_recipe(recipe).rules


def test_there_are_such_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md"} <= {page for page, _ in snippets("python")}
    assert "README.md" in {page for page, _ in snippets("yaml")}
