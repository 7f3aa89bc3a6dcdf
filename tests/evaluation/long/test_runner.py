"""Sessions on a model: both ways of asking equal fresh runs of the same text, and no cache gets away with anything."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rarefy
from rarefy.core.errors import OptionError
from rarefy.evaluation.candidates import Candidate
from rarefy.evaluation.forward import cache_bytes, fork, forward
from rarefy.evaluation.long.results import LongComparison, gain, summarize
from rarefy.evaluation.long.runner import evaluate_long
from rarefy.evaluation.long.sessions import Session, Turn
from rarefy.evaluation.long.suite import POSITIONS, LongProtocol
from rarefy.formats.bytes import ByteCount
from rarefy.sources.texts import open_text
from tests.caches import bad_cache, perfect_cache

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = " ".join("The cat number is here and there again. " for _ in range(300))
PROTOCOL = LongProtocol(length=256, sessions=1, documents=2, chunk=32, tasks=(POSITIONS,))
SESSION = Session(
    task="own", id="0", context="some context of letters that is a little long",
    turns=(Turn(prompt=" first", answer=" one", depth=0.5), Turn(prompt=" second", answer=" two")),
)  # fmt: skip


class Characters:
    """A tokenizer of one token per character."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + (ord(letter) % 95) for letter in text]}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=600, initializer_range=0.4,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def run(model: Any, **caches: Any) -> LongComparison:
    candidates = [Candidate(name, model, cache=cache) for name, cache in caches.items()]
    dense = Candidate("dense", model)
    return evaluate_long(candidates, Characters(), TEXT, PROTOCOL, reference=dense, sessions=[SESSION])


def fresh(model: Any, before: str, answer: str) -> float:
    """The mean NLL of ``answer`` after ``before`` in one pass over both."""
    tokens = torch.tensor([Characters()(before + answer)["input_ids"]])
    log_probs = forward(model, tokens)[0].log_softmax(-1)
    start = len(before)
    return float(-log_probs[start - 1 : -1].gather(1, tokens[0, start:, None]).mean())


def test_both_ways_of_asking_equal_fresh_runs(model: Any) -> None:
    found = run(model).reference
    assert found is not None
    nll = {(answer.mode, answer.turn): answer.nll for answer in found.answers}
    context, (one, two) = SESSION.context, SESSION.turns
    talk = context + one.prompt + one.answer
    assert nll["multi_request", 0] == pytest.approx(fresh(model, context + one.prompt, one.answer), abs=1e-4)
    assert nll["multi_request", 1] == pytest.approx(fresh(model, context + two.prompt, two.answer), abs=1e-4)
    assert nll["multi_turn", 0] == pytest.approx(nll["multi_request", 0], abs=1e-5)
    assert nll["multi_turn", 1] == pytest.approx(fresh(model, talk + two.prompt, two.answer), abs=1e-4)
    assert abs(nll["multi_turn", 1] - nll["multi_request", 1]) > 1e-3


def test_an_exact_answer_is_one_that_greedy_decoding_gives(model: Any) -> None:
    tokens = torch.tensor([Characters()(SESSION.context + " first")["input_ids"]])
    with torch.no_grad():
        decoded = model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
    greedy = "".join(next(letter for letter in map(chr, range(32, 127)) if 1 + ord(letter) % 95 == t) for t in decoded)
    session = SESSION.model_copy(update={"turns": (Turn(prompt=" first", answer=greedy),)})
    found = evaluate_long([Candidate("m", model)], Characters(), TEXT, PROTOCOL, sessions=[session]).candidates[0]
    assert all(answer.exact for answer in found.answers) and found.answers[0].kl is None


def test_a_bad_cache_is_told_from_a_perfect_one(model: Any) -> None:
    found = run(model, perfect=perfect_cache, bad=bad_cache)
    assert found.reference is not None
    perfect, bad = (summarize(each, found.reference)[-1] for each in found.candidates)
    assert perfect.kl is None and bad.kl is None  # one session has no interval
    for each, differs in zip(found.candidates, (False, True), strict=True):
        for answer in each.answers:
            assert answer.kl is not None and (answer.kl > 1e-3) == differs
        assert each.positions is not None and found.reference.positions is not None and each.positions.kl is not None
        assert (min(each.positions.kl[1:]) > 1e-3) == differs
        for change in each.positions.change(found.reference.positions)[1:]:  # the first lies in the first chunk
            assert change is not None and (abs(change.value) > 1e-4) == differs
    stages = found.candidates[0].stages
    assert stages is not None and stages.cache_bytes_per_token == 2 * 2 * 2 * 8 * 4


def test_a_fork_grows_on_its_own(model: Any) -> None:
    past = perfect_cache(model)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        model(tokens, use_cache=True, **{_name(model): past})
        twin = fork(past)
        model(tokens, use_cache=True, **{_name(model): twin})
    assert past.get_seq_length() == 8 and twin.get_seq_length() == 16


def test_a_cache_that_knows_its_bytes_is_believed(model: Any) -> None:
    past = perfect_cache(model)
    with torch.no_grad():
        model(torch.arange(1, 9)[None], use_cache=True, **{_name(model): past})
    assert cache_bytes(past) == 2 * 2 * 2 * 8 * 8 * 4
    for stated in (7, lambda: 7, lambda: ByteCount(codes=3, scales=4)):
        past.nbytes = stated
        assert cache_bytes(past) == 7


def _name(model: Any) -> str:
    from rarefy.evaluation.forward import cache_argument

    return cache_argument(model.forward)


def test_positions_equal_the_perplexity_of_whole_windows(model: Any) -> None:
    found = run(model).reference
    assert found is not None and found.positions is not None
    tokens = torch.tensor(Characters()(TEXT)["input_ids"][: 2 * 256]).view(2, 256)
    log_probs = forward(model, tokens).log_softmax(-1)[:, :-1]
    nll = -log_probs.gather(2, tokens[:, 1:, None])[..., 0]
    for index, (start, stop) in enumerate(found.positions.bins):
        assert found.positions.nll[index] == pytest.approx(float(nll[:, start - 1 : stop - 1].mean()), abs=1e-4)


def test_contexts_beyond_the_model_are_refused(model: Any) -> None:
    long = SESSION.model_copy(update={"context": "x" * 700})
    with pytest.raises(OptionError, match="more than the 600 positions of 'm'"):
        evaluate_long([Candidate("m", model)], Characters(), TEXT, PROTOCOL, sessions=[long])
    with pytest.raises(OptionError, match="no model"):
        evaluate_long([], Characters(), TEXT, PROTOCOL)


def test_a_killed_run_goes_on(model: Any, tmp_path: Path) -> None:
    loads: list[str] = []

    def candidate(name: str) -> Candidate:
        def load() -> Any:
            loads.append(name)
            return model

        return Candidate(name, load=load, identity=f"{name} on disk")

    def go(text: str = TEXT, sessions: Sequence[Session] = (SESSION,)) -> LongComparison:
        given: dict[str, Any] = {"reference": candidate("dense"), "sessions": sessions, "work_dir": tmp_path}
        return evaluate_long([candidate("a")], Characters(), text, PROTOCOL, **given)

    first = go()
    assert loads == ["dense", "a"]
    assert go() == first and loads == ["dense", "a"]
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 4
    kept[0].unlink()
    again = go()
    assert len(loads) == 4 and [answer.nll for answer in again.candidates[0].answers] == pytest.approx(
        [answer.nll for answer in first.candidates[0].answers]
    )
    more = SESSION.model_copy(update={"id": "1", "context": "another context"})
    go(sessions=[SESSION, more])
    assert len(list(tmp_path.iterdir())) == 6  # what was there is not asked again
    go(text=TEXT.replace("cat", "dog"))
    assert len(list(tmp_path.iterdir())) == 8  # another text of the same name is another text


def test_a_model_and_itself_are_kept_apart(model: Any, tmp_path: Path) -> None:
    def go() -> LongComparison:
        one, same = (Candidate("m", load=lambda: model, identity="m on disk") for _ in range(2))
        given: dict[str, Any] = {"sessions": [SESSION], "work_dir": tmp_path}
        return evaluate_long([one], Characters(), TEXT, PROTOCOL, reference=same, **given)

    first = go()
    assert first.reference is not None and first.reference.answers[0].kl is None
    assert first.candidates[0].answers[0].kl is not None and go() == first


def test_summaries_pair_answers_and_name_what_a_book_taught(model: Any) -> None:
    dice = random.Random(0)
    sessions = [
        Session(
            task=task, id=str(number), context="".join(dice.choices(LETTERS, k=40)),
            turns=(Turn(prompt=" q", answer=" abc"), Turn(prompt=" r", answer=" de")),
        )
        for task in ("language", "language_without_book")
        for number in range(3)
    ]  # fmt: skip
    protocol = PROTOCOL.model_copy(update={"tasks": ()})
    found = evaluate_long(
        [Candidate("bad", model, cache=bad_cache)], Characters(), TEXT, protocol,
        reference=Candidate("dense", model), sessions=sessions,
    )  # fmt: skip
    rows = summarize(found.candidates[0], found.reference)
    assert [(row.task, row.mode) for row in rows] == [
        ("language", "multi_turn"), ("language", "multi_request"), ("language_without_book", "multi_turn"),
        ("language_without_book", "multi_request"), ("all", "both"),
    ]  # fmt: skip
    whole = rows[-1]
    assert whole.answers == 24 and whole.kl is not None and whole.kl.low > 0 and whole.nll_change is not None
    assert whole.nll_change.value == pytest.approx(
        sum(a.nll for a in found.candidates[0].answers) / 24 - sum(a.nll for a in found.reference.answers) / 24  # type: ignore[union-attr]
    )
    assert gain(found.candidates[0]) is not None


@pytest.mark.demo
def test_the_real_model_tells_caches_apart() -> None:
    model = rarefy.load("demo")
    caches = {"perfect": perfect_cache, "bad": bad_cache}
    found = evaluate_long(
        [Candidate(name, model, cache=cache) for name, cache in caches.items()], rarefy.load_tokenizer("demo"),
        open_text("demo", "evaluation").text,
        LongProtocol(length=256, sessions=2, documents=2, chunk=128, tasks=("passkey",)),
        reference=Candidate("dense", model),
    )  # fmt: skip
    perfect, bad = (summarize(each, found.reference)[-1] for each in found.candidates)
    assert perfect.kl is not None and perfect.nll_change is not None and bad.kl is not None
    assert perfect.kl.high < 1e-3 and abs(perfect.nll_change.value) < 1e-3
    assert bad.nll_change is not None and bad.kl.low > 0.1 and bad.nll_change.low > 0.1
