"""Recipes with parameters: gates that learn, killed or not, thresholds that keep their budget, and a sparse model that
trains; saved, loaded and used."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import rarefy
from rarefy.core.errors import OptionError, RecipeError
from rarefy.evaluation.attention import examine
from rarefy.integrations.transformers import plan_fitting
from rarefy.integrations.transformers.listening import listen
from rarefy.integrations.transformers.plan_fitting import GateTrainer
from rarefy.integrations.transformers.plan_setup import PARAMS_NAME, SETUP, attention_recipe, load_setup
from rarefy.training.gates import lessons
from rarefy.training.loop import Schedule
from tests.processes import fresh_process
from tests.zoo import VOCABULARY, dense_folder, family_of

pytestmark = pytest.mark.compat
SMALL = {"block_q": 8, "block_k": 8, "dense_below": 0, "max_density": 1.0, "last_rows": 0, "sink": 0}


def tokens(rows: int = 4, count: int = 64, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def topics(rows: int = 4, count: int = 128, seed: int = 1) -> Tensor:
    """Texts whose blocks of 8 tokens are of one kind each, so that blocks differ in what they are worth."""
    return tokens(rows, count // 8, seed).repeat_interleave(8, 1)


def model_of(family: str = "llama", **changes: Any) -> Any:
    """A tiny model whose attention is no longer near even: queries and keys are many times as long."""
    model = family_of(family).build(max_position_embeddings=256, **changes)
    for name, weight in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            weight.data *= 12
    model.generation_config.pad_token_id = 0
    return model


def recall(model: Any, setup: Any) -> float:
    """The mean share of attention that the model's plans keep of other tokens than they were trained on."""
    from rarefy.integrations.transformers.plan_setup import prepared, shape_of

    modules = prepared(model)
    found: list[Tensor] = []

    def hear(call: Any) -> None:
        plan = setup.plan(shape_of(modules[call.layer], model, len(modules)), torch.device("cpu"))
        found.append(examine(plan, call, first=4).recall.mean())

    listen(model, topics(seed=9), hear)
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_trained_gates_find_more_than_untrained_ones_and_chance(family: str) -> None:
    model = model_of(family)
    recipe = attention_recipe("seer_attention", {**SMALL, "density": 0.25})
    trainer = GateTrainer("seer_attention", recipe, model, topics(8), 2, 0)
    untrained = recall(model, trainer.setup())
    losses = trainer.train(Schedule(steps=80, rate=1e-2, warmup=5))
    trained = recall(model, trainer.setup())
    chance = recall(model, rarefy.set_attention(model, "random", density=0.25, **SMALL))
    best = recall(model, rarefy.set_attention(model, "oracle", density=0.25, **SMALL))
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert best >= trained > untrained > chance and trained > chance + 0.8 * (best - chance)


def test_a_text_is_read_once_while_there_is_room_and_teaches_the_same() -> None:
    model = model_of()
    recipe = attention_recipe("seer_attention", SMALL)
    weights, read = [], []
    for room in (1 << 30, 0):
        trainer = GateTrainer("seer_attention", recipe, model, topics(3), 2, 0)
        trainer.room, passes = room, 0

        def count(*given: Any) -> None:
            nonlocal passes
            passes += 1

        with model.model.register_forward_pre_hook(count):
            losses = trainer.train(Schedule(steps=6, rate=1e-2))
        weights.append({name: weight.detach() for name, weight in trainer.weights.items()})
        read.append(passes)
        assert losses[-1] < losses[0] and bool(trainer.lessons) == (room > 0)
    assert read == [3, 12]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


@pytest.mark.parametrize("changes", [{}, {"layer_types": ["sliding_attention", "full_attention"]}])
def test_layers_learn_together_what_they_learn_alone(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """Also where layers differ in their windows and rotary embeddings."""
    model = model_of("gemma3", num_hidden_layers=2, sliding_window=24, **changes) if changes else model_of()
    recipe = attention_recipe("seer_attention", SMALL)
    gradients, sizes = [], []
    for together in (1 << 30, 0):
        monkeypatch.setattr(plan_fitting, "TOGETHER", together)
        trainer = GateTrainer("seer_attention", recipe, model, topics(1), 1, 0)
        loss = trainer.step(0)
        sizes.append(sum(len(layers) for layers, _, _ in trainer.lessons.get(0, [])))
        gradients.append((loss, {name: weight.grad for name, weight in trainer.weights.items()}))
    assert sizes == [4, 0] and gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for name, gradient in gradients[0][1].items():
        assert gradient is not None and torch.allclose(gradient, gradients[1][1][name], atol=1e-6), name


@pytest.mark.parametrize("truth", ["max", "mass"])
def test_what_a_gate_learns_of_a_block(truth: Any) -> None:
    """The truth of a lesson is the greatest or the sum of all probabilities of its queries, block by block."""
    model = model_of()
    recipe = attention_recipe("seer_attention", {**SMALL, "sink": 1, "local": 2})
    trainer = GateTrainer("seer_attention", recipe, model, topics(1), 1, 0)

    def hear(call: Any) -> None:
        found = lessons(call, trainer.gates[call.layer], recipe, 8, truth)
        keys = call.source.keys().repeat_interleave(call.group, 1)
        hidden = torch.ones(128, 128, dtype=torch.bool).triu(1)
        shares = (call.query @ keys.mT * call.scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        tiles = shares.unflatten(3, (16, 8))
        single = tiles.amax(4) if truth == "max" else tiles.sum(4)
        block = single.unflatten(2, (16, 8)).amax(3) if truth == "max" else single.unflatten(2, (16, 8)).sum(3)
        assert torch.allclose(found["prefill"].wanted, block[:, :, 4:], atol=1e-5)
        shared = single[:, :, 64:].unflatten(1, (2, 2))
        shared = shared.amax(2) if truth == "max" else shared.sum(2)
        assert torch.allclose(found["decode"].wanted, shared, atol=1e-5)
        row = found["prefill"].free[0, 0, 3]  # the block of queries 7: all but the sink, itself and the one before
        assert row.nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
        assert found["decode"].places.tolist() == list(range(64, 128))

        both = lessons(call, trainer.gates[call.layer], recipe, 8, "both")["decode"].wanted
        most, mass = single[:, :, 64:].unflatten(1, (2, 2)), tiles.sum(4)[:, :, 64:].unflatten(1, (2, 2)).mean(2)
        if truth == "max":
            most = most.amax(2)
            assert torch.allclose(2 * both, mass + most / most.sum(-1, keepdim=True), atol=1e-5)

    listen(model, topics(1), hear)


def test_gates_are_written_and_loaded_and_serve_every_phase(tmp_path: Path) -> None:
    dense_folder("llama", tmp_path / "dense", max_position_embeddings=256)
    report = rarefy.train(
        tmp_path / "dense",
        options={**SMALL, "density": 0.5},
        out=tmp_path / "out",
        data=tokens(),
        steps=3,
        device="cpu",
    )
    assert report.steps == 3 and report.tokens == 3 * 64 and report.bytes > 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    setup = getattr(model, SETUP)
    assert setup.name == "seer_attention" and set(setup.params) == {0, 1}
    kept = load_setup(tmp_path / "out" / PARAMS_NAME, model)
    assert set(kept.params[0]) == {"prefill.keys", "decode.keys", "decode.queries", "decode.gain"}
    for layer, own in kept.params.items():
        for name, tensor in own.items():
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, setup.params[layer][name])
    model.generation_config.pad_token_id = 0
    # Prompts in one pass and in pieces, with left padding, and steps: dense at density 1.
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    dense.generation_config.pad_token_id = 0
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    asked = {"input_ids": tokens(2, 40), "attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    rarefy.set_attention(model, "seer_attention", params=tmp_path / "out" / PARAMS_NAME, density=1.0)
    assert torch.equal(model.generate(**asked), dense.generate(**asked))
    sparse = rarefy.set_attention(model, "seer_attention", params=tmp_path / "out" / PARAMS_NAME)
    assert sparse is not None and model.generate(**asked).shape == (2, 60)
    assert sparse.report.density() < 0.8 and sum(sparse.report.dense().values()) == 0
    few = rarefy.set_attention(model, "seer_attention", params=tmp_path / "out" / PARAMS_NAME, budget=16, density=1.0)
    assert few is not None
    few.report.keep_maps = True
    assert model.generate(**asked).shape == (2, 60)
    assert [int(each.count.max()) for each in few.report.maps.values()] == [2, 2]  # the last step's


def test_padding_and_packing_change_no_choice() -> None:
    """Sequences that begin with a block of their own are given the same blocks alone, padded and packed."""
    model = model_of()
    rarefy.train(model, options={**SMALL, "density": 0.4}, data=topics(), steps=2)
    setup = getattr(model, SETUP)
    setup.report.keep_maps = True
    text = topics(2, 48, seed=7)

    def choices(**given: Any) -> Tensor:
        with torch.no_grad():
            model(use_cache=False, **given)
        return torch.stack([each.dense()[0] for each in setup.report.maps.values()])

    alone = [choices(input_ids=row[None]) for row in text]
    places = torch.arange(48)[None]
    padded = choices(
        input_ids=torch.cat([text[:1, :16] * 0, text[:1]], 1),
        position_ids=torch.cat([torch.ones(1, 16).long(), places], 1),
        attention_mask=torch.cat([torch.zeros(1, 16), torch.ones(1, 48)], 1).long(),
    )  # fmt: skip
    packed = choices(input_ids=text.flatten()[None], position_ids=torch.cat([places, places], 1))
    assert torch.equal(padded[:, :, 2:, 2:], alone[0])
    assert torch.equal(packed[:, :, :6, :6], alone[0]) and torch.equal(packed[:, :, 6:, 6:], alone[1])


def test_steps_with_a_cache_choose_as_one_pass_does(tmp_path: Path) -> None:
    """However tokens came, and also after some were taken back."""
    model = model_of()
    rarefy.train(model, options={**SMALL, "density": 0.3}, data=tokens(), steps=2)
    cache = model._rarefy_kv(model)
    given = tokens(2, 50, seed=4)
    argument = "cache" if "cache" in transformers.LlamaForCausalLM.forward.__annotations__ else "past_key_values"
    with torch.no_grad():
        for part in given[:, :46].split([20, 9, 17], 1):
            model(input_ids=part, use_cache=True, **{argument: cache})
        model(input_ids=tokens(2, 3, seed=5), use_cache=True, **{argument: cache})
        cache.crop(-3)
        last = [model(input_ids=given[:, at : at + 1], use_cache=True, **{argument: cache}).logits for at in (46, 47)]
        fresh = model._rarefy_kv(model)
        for part in given[:, :46].split([20, 9, 17], 1):
            model(input_ids=part, use_cache=True, **{argument: fresh})
        again = [model(input_ids=given[:, at : at + 1], use_cache=True, **{argument: fresh}).logits for at in (46, 47)]
    assert torch.allclose(torch.cat(last), torch.cat(again), atol=1e-5)


def train_gates(folder: Path, out: Path, work: Path | None, dies: bool) -> None:
    """Ten steps, kept after each in ``work``; with ``dies`` it is killed after the fourth."""
    from rarefy.training import loop

    torch.set_num_threads(1)
    keep, kept = loop._keep, []

    def dying(*arguments: Any) -> None:
        keep(*arguments)
        kept.append(True)
        if len(kept) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.KEEP_EVERY = 0.0
    if dies:
        loop._keep = dying
    options = {"block_q": 8, "block_k": 8}
    rarefy.train(folder, out=out, data=tokens(4, 48), steps=10, options=options, work_dir=work, device="cpu")


def test_a_training_that_is_killed_ends_in_the_same_bytes(tmp_path: Path) -> None:
    dense, work, out = (tmp_path / name for name in ("dense", "work", "out"))
    dense_folder("llama", dense, max_position_embeddings=256)
    assert fresh_process(train_gates, dense, tmp_path / "whole", None, False) == 0
    assert fresh_process(train_gates, dense, out, work, True) == -signal.SIGKILL and not out.exists()
    assert fresh_process(train_gates, dense, out, work, False) == 0
    for name in sorted(os.listdir(tmp_path / "whole")):
        whole, resumed = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "out"))
        assert whole == resumed, name


def test_calibrated_thresholds_keep_their_budget_on_what_they_saw(tmp_path: Path) -> None:
    model = model_of()
    options = {**SMALL, "block_k": 4, "local": 2, "start": 0.5, "halvings": 12}
    del options["last_rows"]
    given = topics(4, 96)
    densities = []
    for budget in (0.5, 0.02):
        setup = rarefy.set_attention(model, "sale", data=given, budget=budget, **options)
        assert setup is not None and setup.params[0]["threshold"].shape == (4,)
        from rarefy.attention.thresholds import head_errors
        from rarefy.integrations.transformers.plan_setup import prepared, shape_of

        modules = prepared(model)
        sums: dict[int, list[Tensor]] = {}

        def hear(call: Any, setup: Any = setup, modules: Any = modules, sums: Any = sums) -> None:
            plan = setup.plan(shape_of(modules[call.layer], model, len(modules)), torch.device("cpu"))
            apart, whole = head_errors([plan], call)
            sums.setdefault(call.layer, []).append(torch.stack([apart[0], whole]))

        for row in given:
            listen(model, row[None], hear)
        for found in sums.values():
            apart, whole = torch.stack(found).sum(0)
            assert bool((apart / whole <= budget + 1e-6).all())
        with torch.no_grad():
            model(input_ids=given, use_cache=False)
        densities.append(setup.report.density())
    assert densities[0] < densities[1] <= 1.0
    setup.save(tmp_path / "sale.safetensors")
    loaded = rarefy.set_attention(model, "sale", params=tmp_path / "sale.safetensors")
    assert loaded is not None and torch.equal(loaded.params[1]["threshold"], setup.params[1]["threshold"])
    one = rarefy.set_attention(model, "sale", threshold=0.01, block_q=8, block_k=4)
    assert one is not None and not one.params


def test_a_model_trains_sparsely_through_chosen_blocks() -> None:
    model = model_of()
    given = tokens(4, 64)
    options = {key: value for key, value in SMALL.items() if key != "last_rows"}
    setup = rarefy.set_attention(model, "infllm_v2", local=2, size=4, stride=2, density=0.4, **options)
    assert setup is not None
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=given, labels=given, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    assert setup.report.layers[0].executors == {"trainable": 15} and setup.report.density() < 0.7
    key = model.model.layers[0].self_attn.k_proj.weight
    assert key.grad is not None and float(key.grad.abs().sum()) > 0


def test_what_cannot_be_trained_or_calibrated_is_named(tmp_path: Path) -> None:
    model = model_of()
    with pytest.raises(RecipeError, match="nothing to train"):
        rarefy.train(model, "sink_local", data=tokens())
    with pytest.raises(OptionError, match=r"training.*params="):
        rarefy.set_attention(model, "seer_attention")
    dense_folder("llama", tmp_path / "dense")
    with pytest.raises(OptionError, match="Say where to write"):
        rarefy.train(tmp_path / "dense", data=tokens())
    with pytest.raises(RecipeError, match=r"stride 12 has to divide.*set stride=32"):
        rarefy.set_attention(model, "infllm_v2", stride=12)
    with pytest.raises(RecipeError, match="set local=2 or more"):
        rarefy.set_attention(model, "infllm_v2", local=1)
    rarefy.train(model, options=SMALL, data=tokens(), steps=1)
    getattr(model, SETUP).save(tmp_path / "gates.safetensors")
    with pytest.raises(RecipeError, match="trained for other pools"):
        rarefy.set_attention(model, "seer_attention", params=tmp_path / "gates.safetensors", pools=("mean",))
