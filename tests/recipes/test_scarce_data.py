"""What calibration data may lack: channels that are never on, experts that no token reaches, tokens, finite values.

Every recipe that calibrates ends in finite weights and says what was missing, or names the layer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rarefy
from rarefy.calibration.report import CompressionReport
from rarefy.core.errors import RecipeError
from rarefy.layers.swap import compressed
from tests.recipes import test_calibrated, test_sensitive
from tests.zoo import FAMILIES, VOCABULARY, logits

PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: plan[:2] for name, plan in test_calibrated.PLANS.items()},
    **test_sensitive.PLANS,
    "wanda 2:4 int4": ("wanda", {"n": 2, "m": 4, "num_bits": 4, "group_size": 16}),
}
EVERY = pytest.mark.parametrize("name", PLANS)


def tokens(rows: int = 12, length: int = 20) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


def solved(model: Any, name: str, data: torch.Tensor) -> CompressionReport:
    """Compress ``model`` in place; all of it must stay finite, and weights must still resemble what they were."""
    recipe, options = PLANS[name]
    report = rarefy.compress(model, recipe, options=options, data=data)
    assert all(bool(torch.isfinite(term.decode()).all()) for _, layer in compressed(model) for term in layer.terms)
    assert report.layers and all(layer.relative_error < 0.9 for layer in report.layers)
    return report


@EVERY
def test_channels_that_are_never_on(name: str) -> None:
    """Their weights are kept, if perhaps scaled where a norm undoes it: one day there may be an input."""
    model = FAMILIES["llama"].build()
    block = model.model.layers[1]
    with torch.no_grad():
        block.input_layernorm.weight[16:32] = 0
        block.mlp.up_proj.weight[3:6] = 0  # inputs of down_proj
    dense = {part: block.get_submodule(part).weight.clone() for part in ("self_attn.q_proj", "mlp.down_proj")}
    solved(model, name, tokens())
    assert bool(torch.isfinite(logits(model, "llama")).all())
    if PLANS[name][0] in ("sparsegpt", "wanda", "gqsa"):
        return  # these may drop what nothing meets
    for part, columns in (("self_attn.q_proj", slice(16, 32)), ("mlp.down_proj", slice(3, 6))):
        kept = block.get_submodule(part).weight.detach()
        likeness = torch.cosine_similarity(dense[part][:, columns], kept[:, columns], dim=0)
        assert float(likeness.min()) > 0.8, part


@EVERY
def test_experts_that_no_token_reaches(name: str) -> None:
    model = FAMILIES["qwen3_moe"].build(num_experts=8)
    with torch.no_grad():  # of two opposite logits one is positive, so the last four, at zero, are never the best two
        router = model.model.layers[1].mlp.gate.weight
        router[1], router[3], router[4:] = -router[0], -router[2], 0
    report = solved(model, name, tokens())
    for part in ("gate_up_proj", "down_proj"):
        note = f"model.layers.1.mlp.experts.{part}: no calibration data reached expert 4, 5, 6, 7; solved without"
        assert note in report.fallbacks


@EVERY
def test_fewer_tokens_than_columns(name: str) -> None:
    report = solved(FAMILIES["llama"].build(), name, tokens(1, 7))
    assert any(note.endswith("1 x 7 tokens") for note in report.notes)
    if PLANS[name][0] in ("gptq", "spqr", "sparsegpt"):  # whose Hessians are singular then
        few = [note for note in report.fallbacks if "only 7 calibration tokens for" in note]
        assert len(few) == len(report.layers)


@EVERY
def test_values_that_are_no_numbers(name: str) -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    recipe, options = PLANS[name]
    with pytest.raises(RecipeError, match=r"'model\.layers\.\d\..*' ?.*(NaN|finite)"):
        rarefy.compress(model, recipe, options=options, data=tokens())
    assert not list(compressed(model))
