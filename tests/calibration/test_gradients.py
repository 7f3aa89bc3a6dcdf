"""Gradient statistics from the reverse sweep: equal to plain autograd on the whole model, sequence by sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rarefy
from rarefy.calibration import driver
from rarefy.calibration.activations import MemoryShelf
from rarefy.calibration.gradients import _crc, loss_of, states_at_once, steps
from rarefy.calibration.skeleton import use_expert_loop_
from rarefy.contracts import Recipe, Rule
from rarefy.core.errors import RecipeError
from rarefy.layers.swap import sites
from tests.calibration.oracle import batches_for, close, wide, wide_batches
from tests.calibration.recipes import SEEN
from tests.zoo import VOCABULARY, family_of

transformers.logging.set_verbosity_error()
SEED = 11
OUTSIDE = {
    "bert_lm": {"cls.predictions.transform.dense"}, "bert_labels": {"bert.pooler.dense"},
    "bert_features": {"pooler.dense"},
}  # fmt: skip


def compress(model: Any, data: Any, method: str = "everything_for_tests", **settings: Any) -> Any:
    SEEN.clear()
    recipe = Recipe(name=method, rules=(Rule(method=method, ignore=("re:decoder",)),))
    return rarefy.compress(model, recipe, data=data, device="cpu", seed=SEED, **settings)


def rows(batches: Any) -> Any:
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            yield {name: tensor[row : row + 1] for name, tensor in batch.items()}


def whole_model(model: Any, batches: Any, narrow: Any) -> dict[str, list[Tensor]]:
    """The gradient of every site's weight for every sequence, as ``[out, in]``."""
    use_expert_loop_(model)
    found: dict[str, list[Tensor]] = {}
    chosen = list(sites(model))
    for one, original in zip(rows(batches), rows(narrow), strict=True):
        model.zero_grad()
        generator = torch.Generator().manual_seed(SEED ^ _crc(original))
        loss_of(model, model(**one), one, generator).backward()
        for site in chosen:
            gradient = model.get_parameter(site.parameter).grad
            gradient = torch.zeros_like(model.get_parameter(site.parameter)) if gradient is None else gradient.clone()
            found.setdefault(site.name, []).append(gradient.T if site.kind == "conv1d" else gradient)
    return found


def data_for(family: str) -> Any:
    batches = batches_for(family_of(family))
    if family == "t5":
        for batch in batches:
            batch["decoder_input_ids"] = batch["input_ids"][:, :6]
    return batches


@pytest.mark.compat
@pytest.mark.parametrize(
    "family", ["llama", "qwen3_moe", "gemma3", "opt", "gpt2", "bert_lm", "bert_labels", "bert_features", "vit", "t5"]
)
def test_gradients_are_those_of_the_whole_model(family: str) -> None:
    model, batches = family_of(family).build(), data_for(family)
    expected = whole_model(wide(model), wide_batches(batches), batches)
    compress(model, batches)
    inside = {name: layer for name, layer in SEEN.items() if int(layer.statistics.fisher.sequences)}
    assert {name for name in SEEN if name not in inside} == OUTSIDE.get(family, set())
    assert len(inside) >= 8
    for name, layer in inside.items():
        statistics, each = layer.statistics, torch.stack(expected[name])
        assert int(statistics.fisher.sequences) == int(statistics.gradient.sequences) == len(each)
        reached = ~statistics.fisher.unseen()
        assert torch.equal(reached, (each != 0).any(0).flatten(-2).any(-1))
        for found, wanted in (
            (statistics.fisher.sum, each.square().sum(0)), (statistics.gradient.sum, each.sum(0))
        ):  # fmt: skip
            assert close(found[reached], wanted[reached]) < 2e-4, name
        assert torch.equal(statistics.fisher.mean()[~reached], torch.ones_like(statistics.fisher.mean()[~reached]))


@pytest.mark.parametrize(("blocks", "states", "runs"), [(1, 2, 2), (4, 4, 10), (7, 5, 18)])
def test_states_between_some_blocks_are_enough(
    blocks: int, states: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are the same, and no more hidden states are kept at a time than said."""
    held, most, advanced = 0, 0, list[float]()

    class Counted(MemoryShelf):
        def __init__(self, *given: Any) -> None:
            nonlocal held, most
            super().__init__(*given)
            held += 1
            most = max(most, held)

        def discard(self) -> None:
            nonlocal held
            super().discard()
            held -= 1

    sweep = driver.reverse_sweep
    monkeypatch.setattr(driver, "MemoryShelf", Counted)
    monkeypatch.setattr(driver, "reverse_sweep", lambda given, folder, _: sweep(given, folder, count))

    def count(step: float = 1, note: str = "") -> None:
        advanced.append(step)

    model, batches = family_of("llama").build(num_hidden_layers=blocks), batches_for(family_of("llama"))
    expected = whole_model(wide(model), wide_batches(batches), batches)
    compress(model, batches, "fisher_for_tests")
    for name, layer in SEEN.items():
        each = torch.stack(expected[name])
        assert close(layer.statistics.fisher.sum, each.square().sum(0)) < 2e-4, name
    assert len({name.split(".")[2] for name in SEEN}) == blocks
    assert (held, most, sum(advanced)) == (0, states, runs)
    assert most <= states_at_once(blocks) and runs == steps(blocks)


def test_the_loss_of_a_language_model_is_that_of_its_next_tokens() -> None:
    model = family_of("llama").build()
    batch = batches_for(family_of("llama"))[-1]
    output = model(**batch)
    losses = nn.functional.cross_entropy(
        output.logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
    )
    for row, length in ((0, 12), (1, 7)):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        loss = loss_of(model, model(**one), one, torch.Generator()).detach()
        assert float(loss) == pytest.approx(float(losses[row, : length - 1].mean().detach()), rel=1e-5)
    labels = torch.full((2, 12), -100)
    labels[:, 3] = 5
    with_labels = {**batch, "labels": labels}
    own = model(**with_labels)
    assert torch.equal(loss_of(model, own, with_labels, torch.Generator()), own.loss)


def test_neither_batches_nor_their_order_matter() -> None:
    tokens = torch.randint(3, VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(0))
    sums = []
    for data in (tokens, [{"input_ids": row[None]} for row in tokens.flip(0)]):
        compress(family_of("bert_labels").build(), data)
        sums.append({name: layer.statistics.fisher.sum for name, layer in SEEN.items()})
    assert sums[0].keys() == sums[1].keys()
    for name, one in sums[0].items():
        assert close(sums[1][name], one.double()) < 1e-5


def test_sequences_without_a_finite_gradient_are_left_out_and_noted() -> None:
    model = family_of("llama").build()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    tokens = torch.randint(6, VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(0))
    tokens[2, 3] = 5
    report = compress(model, tokens, "fisher_for_tests")
    layer = SEEN["model.layers.0.self_attn.q_proj"]
    assert (int(layer.statistics.fisher.sequences), int(layer.statistics.fisher.skipped)) == (3, 1)
    assert torch.isfinite(layer.statistics.fisher.sum).all()
    assert f"{layer.name}: 1 of 4 sequences had no finite gradient and were left out" in report.fallbacks
    tokens[:, 3] = 5
    with pytest.raises(RecipeError, match=r"'model\.layers\.1\..*' has no finite gradient"):
        compress(family_with_nan(), tokens, "fisher_for_tests")


def family_with_nan() -> Any:
    model = family_of("llama").build()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    return model
