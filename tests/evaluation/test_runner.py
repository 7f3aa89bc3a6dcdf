from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from transformers import LlamaForCausalLM

from rarefy.core.errors import FormatError, OptionError, UnsupportedError
from rarefy.evaluation import runner
from rarefy.evaluation.candidates import Candidate
from rarefy.evaluation.protocol import Protocol
from rarefy.evaluation.results import Evaluation, Sizes
from rarefy.evaluation.runner import evaluate

Build = Callable[..., LlamaForCausalLM]
PROTOCOL = Protocol(text="random", form="as it is", bos=False)


def logits_of(model: LlamaForCausalLM, windows: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return torch.stack([model(input_ids=window[None]).logits[0] for window in windows]).double().numpy()


def numbers(result: Evaluation) -> tuple[float | None, ...]:
    return result.perplexity, result.nll, result.kl, result.top1_agreement, result.tokens


def close(one: Evaluation, other: Evaluation) -> None:
    for left, right in zip(numbers(one), numbers(other), strict=True):
        assert left is right is None or left == pytest.approx(right, rel=1e-5, abs=1e-6)


def test_perplexity_equals_the_loss_of_transformers(tiny: Build, windows: torch.Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    result = evaluate([Candidate("m", model)], windows, PROTOCOL).candidates[0]
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.tokens == 5 * 23
    assert result.kl is None and result.top1_agreement is None


def test_metrics_equal_numpy_in_float64(tiny: Build, near: Build, windows: torch.Tensor) -> None:
    reference, model = tiny(), near()
    log_p = scipy.special.log_softmax(logits_of(reference, windows)[:, :-1], -1)
    log_q = scipy.special.log_softmax(logits_of(model, windows)[:, :-1], -1)
    nll = -np.take_along_axis(log_q, windows[:, 1:].numpy()[..., None], -1).mean()
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    comparison = evaluate([Candidate("m", model)], windows, PROTOCOL, reference=Candidate("dense", reference))
    result = comparison.candidates[0]
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert result.kl == pytest.approx(kl, rel=1e-4)
    assert result.kl > 0.01
    assert result.top1_agreement == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean())
    assert 0 < result.top1_agreement < 1
    assert comparison.passes == 1
    assert comparison.reference is not None and comparison.reference.kl is None
    assert comparison.reference.perplexity == pytest.approx(
        math.exp(-np.take_along_axis(log_p, windows[:, 1:].numpy()[..., None], -1).mean()), rel=1e-4
    )


def test_a_model_agrees_with_itself(tiny: Build, windows: torch.Tensor) -> None:
    model = tiny()
    same = Candidate("dense", model)
    result = evaluate([same, same], windows, PROTOCOL, reference=same)
    for entry in result.candidates:
        assert entry.kl == 0
        assert entry.top1_agreement == 1
        assert entry.tokens == 5 * 23
        assert result.reference is not None and entry.nll == result.reference.nll


def test_many_candidates_equal_single_ones(tiny: Build, near: Build, windows: torch.Tensor) -> None:
    dense = Candidate("dense", tiny())
    candidates = [Candidate(f"seed {seed}", near(seed, noise)) for seed, noise in ((1, 0.02), (2, 0.1), (3, 0.5))]
    together = evaluate(candidates, windows, PROTOCOL, reference=dense)
    assert [entry.model for entry in together.candidates] == ["seed 1", "seed 2", "seed 3"]
    for candidate, entry in zip(candidates, together.candidates, strict=True):
        alone = evaluate([candidate], windows, PROTOCOL, reference=dense).candidates[0]
        assert numbers(alone) == numbers(entry)
    divergences = [entry.kl for entry in together.candidates]
    assert divergences == sorted(divergences)


@pytest.mark.parametrize("micro_batch", [2, 3, 5, 8])
def test_micro_batches_do_not_change_the_result(
    tiny: Build, near: Build, windows: torch.Tensor, micro_batch: int
) -> None:
    dense, candidate = Candidate("dense", tiny()), Candidate("m", near())
    one = evaluate([candidate], windows, PROTOCOL, reference=dense, micro_batch=1)
    many = evaluate([candidate], windows, PROTOCOL, reference=dense, micro_batch=micro_batch)
    close(one.candidates[0], many.candidates[0])
    assert one.reference is not None and many.reference is not None
    close(one.reference, many.reference)


def test_loaders_come_in_passes_and_go_again(tiny: Build, near: Build, windows: torch.Tensor) -> None:
    dense = Candidate("dense", tiny())
    alive: list[weakref.ref[LlamaForCausalLM]] = []
    most = 0

    def load(seed: int) -> Callable[[], LlamaForCausalLM]:
        def build() -> LlamaForCausalLM:
            nonlocal most
            model = near(seed)
            alive.append(weakref.ref(model))
            most = max(most, sum(reference() is not None for reference in alive))
            return model

        return build

    seeds = (1, 2, 3, 4, 5)
    loaded = evaluate([Candidate(str(seed), near(seed)) for seed in seeds], windows, PROTOCOL, reference=dense)
    lazy = [Candidate(str(seed), load=load(seed), resident_bytes=100) for seed in seeds]
    streamed = evaluate(lazy, windows, PROTOCOL, reference=dense, free_bytes=260)
    assert streamed.passes == 3
    assert most == 2
    gc.collect()
    assert not any(reference() for reference in alive)
    for one, other in zip(loaded.candidates, streamed.candidates, strict=True):
        assert numbers(one) == numbers(other)
    assert loaded.reference is not None and streamed.reference is not None
    assert numbers(loaded.reference) == numbers(streamed.reference)


def test_the_reference_may_be_measured_alone(tiny: Build, windows: torch.Tensor) -> None:
    dense = Candidate("dense", load=tiny)
    comparison = evaluate([], windows, PROTOCOL, reference=dense)
    assert comparison.candidates == [] and comparison.reference is not None
    assert comparison.reference.tokens == 5 * 23


def test_logits_never_pile_up(tiny: Build, near: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = torch.randint(97, (12, 24))
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0
    step = runner._Subject.step

    def watched(self: runner._Subject, *arguments: object, **options: object) -> torch.Tensor:
        nonlocal most
        logits = step(self, *arguments, **options)
        made.append(weakref.ref(logits))
        most = max(most, sum(reference() is not None for reference in made))
        return logits

    monkeypatch.setattr(runner._Subject, "step", watched)
    candidates = [Candidate(str(seed), near(seed)) for seed in range(4)]
    evaluate(candidates, windows, PROTOCOL, reference=Candidate("dense", tiny()), micro_batch=1)
    assert len(made) == 12 * 5
    assert most == 2


def test_results_say_how_they_were_made(tiny: Build, windows: torch.Tensor) -> None:
    bits = {"total": 4.25, "codes": 4.0, "scales": 0.25, "tables": 0.0, "indices": 0.0, "values": 0.0}
    sizes = Sizes(bits_per_weight=bits, stored_bytes=17, dense_bytes=64)
    asked = Protocol(context=2048, windows=None, bos=True, text="t", form="f")
    model = tiny().to(torch.bfloat16)
    result = evaluate([Candidate("m", model, sizes=sizes)], windows, asked).candidates[0]
    assert result.protocol == Protocol(context=24, windows=5, bos=True, dtype="bfloat16", text="t", form="f")
    assert (result.bits_per_weight, result.stored_bytes, result.dense_bytes) == (bits, 17, 64)
    assert result.seconds > 0 and result.tokens_per_second > 0 and result.peak_bytes > 0
    assert Evaluation.model_validate_json(result.model_dump_json()) == result


def test_bfloat16_is_near_float32(tiny: Build, windows: torch.Tensor) -> None:
    dense, half = Candidate("fp32", tiny()), Candidate("bf16", tiny().to(torch.bfloat16))
    result = evaluate([half], windows, PROTOCOL, reference=dense)
    assert result.reference is not None
    assert result.candidates[0].perplexity == pytest.approx(result.reference.perplexity, rel=0.05)
    assert 0 < result.candidates[0].kl < 0.05


def test_training_models_are_measured_without_dropout_and_go_on_training(tiny: Build, windows: torch.Tensor) -> None:
    model = tiny(attention_dropout=0.5)
    quiet = evaluate([Candidate("m", model)], windows, PROTOCOL).candidates[0]
    model.train()
    assert numbers(evaluate([Candidate("m", model)], windows, PROTOCOL).candidates[0]) == numbers(quiet)
    assert model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_logits_are_an_error_that_names_model_and_window(
    tiny: Build, near: Build, windows: torch.Tensor, value: float
) -> None:
    windows[windows == 96] = 95
    windows[3, 10:12] = 96

    def spoil(_: torch.nn.Module, __: tuple[object, ...], given: dict[str, torch.Tensor], output: Any) -> None:
        output.logits[..., 0].masked_fill_(given["input_ids"] == 96, value)

    model = near()
    model.register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(FormatError, match=r"'broken' gives .* not finite at 2 of 23 positions of window 3;"):
        evaluate([Candidate("broken", model)], windows, PROTOCOL, reference=Candidate("dense", tiny()), micro_batch=2)


def test_other_vocabularies_are_refused(tiny: Build, windows: torch.Tensor) -> None:
    with pytest.raises(UnsupportedError, match="'wide' predicts 128 tokens where the reference predicts 97"):
        evaluate([Candidate("wide", tiny(vocab=128))], windows, PROTOCOL, reference=Candidate("dense", tiny()))
    with pytest.raises(OptionError, match="'small' has a vocabulary of 50"):
        evaluate([Candidate("small", tiny(vocab=50))], windows, PROTOCOL)


def test_bad_requests_are_one_sentence(tiny: Build, windows: torch.Tensor) -> None:
    model = Candidate("m", tiny())
    for bad in (windows[0], windows.int(), windows[:0], windows[:, :1]):
        with pytest.raises(OptionError, match=r"LongTensor \[count, context\]"):
            evaluate([model], bad, PROTOCOL)
    with pytest.raises(OptionError, match="A context of 65 is more than the 64 positions of 'm'"):
        evaluate([model], torch.zeros(1, 65, dtype=torch.long), PROTOCOL)
    with pytest.raises(OptionError, match="no model"):
        evaluate([], windows, PROTOCOL)
    with pytest.raises(OptionError, match="micro_batch"):
        evaluate([model], windows, PROTOCOL, micro_batch=0)


def test_interrupts_pass_through_and_restore_the_model(tiny: Build, windows: torch.Tensor) -> None:
    model = tiny().train()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate([Candidate("m", model)], windows, PROTOCOL)
    assert model.training


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers(tiny: Build, near: Build, windows: torch.Tensor) -> None:
    on_cpu = evaluate([Candidate("m", near())], windows, PROTOCOL, reference=Candidate("dense", tiny()))
    mixed = evaluate([Candidate("m", near().cuda())], windows, PROTOCOL, reference=Candidate("dense", tiny()))
    on_gpu = evaluate([Candidate("m", near().cuda())], windows, PROTOCOL, reference=Candidate("dense", tiny().cuda()))
    for other in (mixed, on_gpu):
        assert other.candidates[0].nll == pytest.approx(on_cpu.candidates[0].nll, rel=1e-4)
        assert other.candidates[0].kl == pytest.approx(on_cpu.candidates[0].kl, rel=1e-3)
    assert 0 < on_gpu.candidates[0].peak_bytes <= torch.cuda.max_memory_allocated()
