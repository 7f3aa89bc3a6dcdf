"""A runner keeps a sequence, and says the same as the model whatever came before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rarefy
from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.decoding.runner import CHUNK, Runner
from tests.decoding.models import DECODERS, build_model, compress, prompt


def last(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens[None]).logits[0, -1:]


def test_a_sequence_that_is_fed_cropped_and_begun_again() -> None:
    model, tokens = build_model("qwen3"), prompt(20)
    runner = Runner(model)
    assert runner.name == "torch" and runner.room == 64
    assert torch.allclose(runner.start(tokens[:7]), last(model, tokens[:7]), atol=1e-4)
    assert torch.allclose(runner.extend(tokens[7:9]), last(model, tokens[:9]), atol=1e-4)
    assert runner.tokens == tokens[:9].tolist() and runner.room == 55
    runner.crop(4)
    assert runner.tokens == tokens[:4].tolist() and runner.cache.length == 4
    assert torch.allclose(runner.extend(tokens[9:]), last(model, torch.cat([tokens[:4], tokens[9:]])), atol=1e-4)


def test_what_two_prompts_share_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build_model("llama"), prompt(12)
    runner = Runner(model)
    runner.start(tokens)
    fed: list[int] = []
    extend = Runner.extend

    def counted(self: Runner, part: torch.Tensor) -> torch.Tensor:
        fed.append(len(part))
        return extend(self, part)

    monkeypatch.setattr(Runner, "extend", counted)
    other = torch.cat([tokens[:8], prompt(3, seed=5)])
    assert torch.allclose(runner.start(other), last(model, other), atol=1e-4)
    assert torch.allclose(runner.start(other), last(model, other), atol=1e-4)  # one token is read for its logits
    assert fed == [3, 1]


def test_a_long_prompt_goes_in_chunks() -> None:
    model = build_model("mistral", max_position_embeddings=1024, sliding_window=300)
    tokens = prompt(CHUNK + 90)
    runner = Runner(model)
    assert torch.allclose(runner.start(tokens), last(model, tokens), atol=2e-4)
    assert runner.cache.length == len(tokens)


def test_a_changed_model_is_noticed() -> None:
    model, tokens = build_model("llama"), prompt(6)
    runner = Runner(model)
    before = runner.start(tokens)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3.0)
    after = runner.start(tokens)
    assert not torch.allclose(before, after, atol=1e-2) and torch.allclose(after, last(model, tokens), atol=1e-4)
    compress(model)
    assert torch.allclose(runner.start(tokens), last(model, tokens), atol=1e-4)
    assert "CompressedLinear" in {type(part.linear).__name__ for part in runner.program.projections()}


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (torch.tensor([], dtype=torch.int64), r"not \[0\] of torch.int64"),
        (torch.tensor([[1, 2]]), r"not \[1, 2\]"),
        (torch.tensor([1.0]), "torch.float32"),
        (torch.tensor([1, 96]), "vocabulary of 96"),
        (torch.tensor([-1]), "vocabulary of 96"),
        (torch.ones(65, dtype=torch.int64), "65 tokens do not fit the model's 64 positions"),
    ],
)
def test_tokens_that_cannot_be_are_refused(tokens: torch.Tensor, says: str) -> None:
    runner = Runner(build_model("llama"))
    with pytest.raises(OptionError, match=says):
        runner.start(tokens)
    assert runner.start(prompt(3)).shape == (1, 96)


@pytest.mark.parametrize("family", DECODERS)
def test_generate_writes_the_same_text(family: str) -> None:
    model = compress(build_model(family))
    ids = prompt(9)[None]
    given = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": 95}
    runner = rarefy.runner(model)
    for turn in (ids, torch.cat([ids, ids], 1)):
        assert torch.equal(runner.generate(turn, **given), model.generate(turn, **given))
        assert torch.equal(model.generate(turn, custom_generate=runner, **given), model.generate(turn, **given))


def test_generate_samples_penalizes_and_stops_as_ever() -> None:
    model, ids = build_model("llama"), prompt(9)[None]
    options = [
        {"do_sample": True, "temperature": 0.8, "top_k": 10, "top_p": 0.9},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": False, "min_new_tokens": 5, "attention_mask": torch.ones_like(ids)},
    ]
    for given in options:
        plain, ours = (
            [torch.manual_seed(1), model.generate(ids, max_new_tokens=20, eos_token_id=7, **given, **more)][1]
            for more in ({}, {"custom_generate": rarefy.runner(model)})
        )
        assert torch.equal(plain, ours)


class Recorder:
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, tokens: torch.Tensor) -> None:
        self.seen += tokens.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_generate_streams() -> None:
    model, ids = build_model("llama"), prompt(4)[None]
    recorder = Recorder()
    made = rarefy.runner(model).generate(ids, max_new_tokens=6, do_sample=False, streamer=recorder)
    assert recorder.seen == made[0].tolist() and recorder.ended


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, "one sequence, not 2"),
        ({"num_beams": 2}, "for beams"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "attention_mask hides some"),
        ({"return_dict_in_generate": True}, "leave return_dict_in_generate out"),
        ({"position_ids": torch.tensor([[1, 2, 3]])}, "leave position_ids out"),
    ],
)
def test_requests_beyond_it_are_refused(given: dict[str, Any], says: str) -> None:
    model = build_model("llama")
    request = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "max_new_tokens": 2, "do_sample": False, **given}
    with pytest.raises(UnsupportedError, match=says):
        model.generate(**request, custom_generate=rarefy.runner(model))


def test_another_model_or_a_filled_cache_is_refused() -> None:
    from transformers import DynamicCache

    from rarefy.evaluation.forward import cache_argument

    model, other, ids = build_model("llama"), build_model("llama"), prompt(3)[None]
    runner = rarefy.runner(model)
    with pytest.raises(OptionError, match="made for another model"):
        other.generate(ids, max_new_tokens=2, do_sample=False, custom_generate=runner)
    cache = DynamicCache(config=model.config)
    name = cache_argument(model.forward)
    model(input_ids=ids[:, :2], use_cache=True, **{name: cache})
    with pytest.raises(UnsupportedError, match="keeps its own cache"):
        model.generate(ids, max_new_tokens=2, do_sample=False, custom_generate=runner, **{name: cache})


def test_a_model_on_another_device_is_refused() -> None:
    model = build_model("llama")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(UnsupportedError, match=r"'model\.layers\.1\.mlp\.gate_proj' is on 'meta'"):
        Runner(model)
