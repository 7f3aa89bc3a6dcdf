"""What recipes see of a layer's inputs: equal to a whole-model forward with plain hooks, on every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rarefy
from rarefy.contracts import Recipe, Rule
from rarefy.layers.swap import dense_weight, sites
from tests.calibration.oracle import assert_inputs, batches_for, input_moments, wide, wide_batches
from tests.calibration.recipes import SAMPLED, SEEN, rounded
from tests.zoo import FAMILIES, RELATIVES, dense_folder, family_of

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
EVERY = [*FAMILIES, *RELATIVES]
ENCODERS = ("bert_lm", "bert_labels", "bert_features", "vit", "t5")


def recipe(method: str, **options: Any) -> Recipe:
    return Recipe(name=method, rules=(Rule(method=method, ignore=("re:decoder",), options=options),))


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    SEEN.clear()
    SAMPLED.clear()


def compress(model: Any, method: str, data: Any, out: Path | None = None, **settings: Any) -> Any:
    options = settings.pop("options", {})
    return rarefy.compress(model, recipe(method, **options), data=data, out=out, device="cpu", **settings)


@pytest.mark.compat
@pytest.mark.parametrize("family", EVERY)
def test_dense_inputs_are_those_of_the_whole_model(family: str) -> None:
    """Also of layers outside the blocks, such as a pooler; padding counts for nothing."""
    model, batches = family_of(family).build(), batches_for(family_of(family))
    expected = input_moments(wide(model), wide_batches(batches))
    compress(model, "inputs_for_tests", batches, options={"inputs": "dense"})
    assert len(SEEN) >= 8
    assert_inputs(SEEN, expected, 1e-5)


def naive(model: Any, batches: Any, blocks: list[str], parts: Any) -> dict[str, Any]:
    """Sequential compression as one would write it down: run everything again for each step, then round."""
    expected: dict[str, Any] = {}
    for block in blocks:
        for part in parts(model, block):
            seen = input_moments(wide(model), wide_batches(batches), f"{block}." if block else "")
            for site in part:
                expected |= {k: v for k, v in seen.items() if k == site.name or k.startswith(f"{site.name}[")}
            with torch.no_grad():
                for site in part:
                    weight = dense_weight(model, site)
                    weight.copy_(rounded(weight.float().contiguous()).decode())
    return expected


def whole_block(model: Any, block: str) -> Any:
    yield [site for site in sites(model) if site.name.startswith(f"{block}.") and kept(site.name)]


def kept(name: str) -> bool:
    return not name.startswith("decoder") and name.rpartition(".")[2] not in ("gate", "lm_head", "classifier")


def by_input(model: Any, block: str) -> Any:
    """Layers of a Llama-like block in groups that read one input."""
    for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        yield [site for site in next(whole_block(model, block)) if site.name.rpartition(".")[2] in names]


def block_names(model: Any) -> list[str]:
    from rarefy.calibration.blocks import find_blocks

    return find_blocks(model, [site for site in sites(model) if not site.name.startswith("decoder")])


@pytest.mark.compat
@pytest.mark.parametrize("family", EVERY)
def test_compressed_inputs_are_those_of_the_blocks_so_far(family: str) -> None:
    model, batches = family_of(family).build(), batches_for(family_of(family))
    compress(family_of(family).build(), "inputs_for_tests", batches)
    leads = tuple(f"{block}." for block in block_names(model))
    inside = {name: layer for name, layer in SEEN.items() if name.startswith(leads)}
    expected = naive(model, batches, block_names(model), whole_block)
    assert_inputs(inside, expected, 1e-4)
    outside = {name: layer for name, layer in SEEN.items() if name not in inside}
    assert_inputs(outside, input_moments(wide(model), wide_batches(batches)), 1e-4)
    assert bool(outside) == (family in ("bert_lm", "bert_labels", "bert_features"))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_true_sequential_inputs_are_those_of_the_layers_so_far(family: str) -> None:
    model, batches = family_of(family).build(), batches_for(family_of(family))
    compress(family_of(family).build(), "inputs_for_tests", batches, options={"true_sequential": True})
    expected = naive(model, batches, block_names(model), by_input)
    assert_inputs(SEEN, expected, 1e-4)
    plain = dict(SEEN)
    compress(family_of(family).build(), "inputs_for_tests", batches)
    name = f"{block_names(model)[0]}.mlp.down_proj"
    difference = plain[name].statistics.gram.sum - SEEN[name].statistics.gram.sum
    assert float(difference.norm() / SEEN[name].statistics.gram.sum.norm()) > 1e-3


def test_streams_of_both_kinds_side_by_side() -> None:
    """One rule wants dense inputs, the other compressed ones; each gets its own."""
    model, batches = family_of("llama").build(), batches_for(family_of("llama"))
    attention = Rule(method="inputs_for_tests", targets=("re:.*self_attn",), options={"inputs": "dense"})
    both = Recipe(name="both", rules=(attention, Rule(method="inputs_for_tests")))
    rarefy.compress(family_of("llama").build(), both, data=batches, device="cpu")
    dense = input_moments(wide(model), wide_batches(batches))
    assert_inputs({name: layer for name, layer in SEEN.items() if "self_attn" in name}, dense, 1e-5)
    expected = naive(model, batches, block_names(model), whole_block)
    assert_inputs({name: layer for name, layer in SEEN.items() if "mlp" in name}, expected, 1e-4)


def test_layers_that_read_one_input_share_its_statistics() -> None:
    compress(family_of("llama").build(), "inputs_for_tests", batches_for(family_of("llama")))
    layer = "model.layers.1.self_attn."
    assert SEEN[f"{layer}q_proj"].statistics.gram is SEEN[f"{layer}v_proj"].statistics.gram
    assert SEEN[f"{layer}q_proj"].statistics.gram is not SEEN[f"{layer}o_proj"].statistics.gram


def test_every_expert_has_its_own_tokens_and_those_without_are_reported() -> None:
    family = family_of("qwen3_moe")
    model = family.build(num_experts=8)
    with torch.no_grad():  # of two opposite logits one is positive, so the last four, at zero, are never the best two
        router = model.model.layers[1].mlp.gate.weight
        router[1], router[3], router[4:] = -router[0], -router[2], 0
    batches = batches_for(family)
    expected = input_moments(wide(model), wide_batches(batches))
    unreached = [e for e in range(8) if f"model.layers.1.mlp.experts.gate_up_proj[{e}]" not in expected]
    assert unreached == [4, 5, 6, 7]
    report = compress(model, "inputs_for_tests", batches, options={"inputs": "dense"})
    assert_inputs(SEEN, expected, 1e-5)
    note = f"no calibration data reached expert {', '.join(map(str, unreached))}; solved without"
    assert f"model.layers.1.mlp.experts.down_proj: {note}" in report.fallbacks
    assert torch.isfinite(run_logits(model)).all()


def run_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**family_of("qwen3_moe").inputs()).logits


def test_a_model_in_bfloat16() -> None:
    model, batches = family_of("llama").build().bfloat16(), batches_for(family_of("llama"))
    expected = input_moments(wide(model), wide_batches(batches))
    compress(model, "inputs_for_tests", batches, options={"inputs": "dense"})
    assert_inputs(SEEN, expected, 0.03)
    assert SEEN["model.layers.0.mlp.down_proj"].statistics.gram.sum.dtype == torch.float32


@pytest.mark.compat
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3_moe", "gpt2", "bert_lm", "t5"])
def test_a_folder_gives_what_the_model_in_memory_gives(family: str, tmp_path: Path) -> None:
    from tests.zoo import same_bytes, tensors

    model, batches = dense_folder(family, tmp_path / "dense"), batches_for(family_of(family))
    streamed = compress(tmp_path / "dense", "importance_for_tests", batches, tmp_path / "streamed")
    in_memory = compress(model, "importance_for_tests", batches, tmp_path / "memory")
    assert same_bytes(tensors(tmp_path / "streamed"), tensors(tmp_path / "memory"))
    errors = [{layer.name: layer.output_error for layer in report.layers} for report in (streamed, in_memory)]
    assert errors[0] == errors[1]
    assert any("calibrated on" in note for note in streamed.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "memory", "streamed"]
