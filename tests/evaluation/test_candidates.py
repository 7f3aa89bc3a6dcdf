from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from rarefy.core.errors import OptionError, RarefyError, UnsupportedError
from rarefy.evaluation.candidates import Candidate, dense_sizes, plan_passes
from rarefy.evaluation.protocol import Protocol
from rarefy.evaluation.runner import evaluate

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BERT = {**SMALL, "vocab_size": 40}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def lazy(*sizes: int) -> list[Candidate]:
    return [Candidate(str(index), load=torch.nn.Identity, resident_bytes=size) for index, size in enumerate(sizes)]


def test_passes_fill_the_memory_in_order() -> None:
    assert plan_passes(lazy(30, 30, 30, 70, 10), None, 100) == [[0, 1], [2], [3, 4]]
    assert plan_passes(lazy(30, 30, 30), Candidate("dense", load=torch.nn.Identity, resident_bytes=40), 100) == [
        [0],
        [1],
        [2],
    ]
    assert plan_passes(lazy(10, 10), None, 1000) == [[0, 1]]


def test_a_model_too_large_for_memory_is_tried_alone() -> None:
    assert plan_passes(lazy(10, 500, 10), None, 100) == [[0], [1], [2]]


def test_models_of_unknown_size_come_one_by_one() -> None:
    assert plan_passes(lazy(0, 0), None, 10**12) == [[0], [1]]
    assert plan_passes(lazy(5, 5), None, None) == [[0], [1]]


def test_loaded_models_share_the_first_pass() -> None:
    loaded = Candidate("loaded", torch.nn.Identity())
    assert plan_passes([*lazy(30, 30), loaded], None, 100) == [[2, 0, 1]]
    assert plan_passes([*lazy(90), loaded], None, 100) == [[1], [0]]
    assert plan_passes([], loaded, 100) == []


def test_a_candidate_is_a_model_or_a_loader() -> None:
    for given in ({}, {"model": torch.nn.Identity(), "load": torch.nn.Identity}):
        with pytest.raises(OptionError, match="'m' needs a model or a way to load one"):
            Candidate("m", **given)


@pytest.mark.parametrize(
    "build",
    [
        lambda: BertForMaskedLM(BertConfig(**BERT)),
        lambda: BertLMHeadModel(BertConfig(**BERT)),
        lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8)),
        lambda: T5ForConditionalGeneration(T5Config(**T5)),
        lambda: torch.nn.Linear(2, 2),
    ],
)
def test_models_that_predict_no_next_token_are_refused_by_class(build: Callable[[], torch.nn.Module]) -> None:
    model = build()
    with pytest.raises(UnsupportedError, match=f"'m' is a {type(model).__name__}, which does not predict next tokens"):
        evaluate([Candidate("m", model)], torch.ones(1, 4, dtype=torch.long), Protocol())


def test_a_bare_decoder_without_head_is_refused(tiny: Callable[..., LlamaForCausalLM]) -> None:
    with pytest.raises(UnsupportedError, match="LlamaModel"):
        Candidate("m", LlamaModel(tiny().config)).open()


@pytest.mark.parametrize(
    "build",
    [
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=40)),
        lambda: OPTForCausalLM(
            OPTConfig(**SMALL, ffn_dim=16, vocab_size=40, max_position_embeddings=8, word_embed_proj_dim=16)
        ),
        lambda: BertLMHeadModel(BertConfig(**BERT, is_decoder=True, max_position_embeddings=8)),
    ],
)
def test_other_causal_models_are_measured(build: Callable[[], torch.nn.Module]) -> None:
    model = build().eval()
    windows = torch.randint(40, (2, 8))
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    result = evaluate([Candidate("m", model)], windows, Protocol()).candidates[0]
    assert result.nll == pytest.approx(loss, rel=1e-4)
    with pytest.raises(RarefyError, match="A context of 9 is more than the 8 positions"):
        evaluate([Candidate("m", model)], torch.ones(1, 9, dtype=torch.long), Protocol())


def test_dense_sizes_count_tied_weights_once(tiny: Callable[..., LlamaForCausalLM]) -> None:
    untied, tied = tiny(tie_word_embeddings=False), tiny(tie_word_embeddings=True)
    assert dense_sizes(untied).stored_bytes - dense_sizes(tied).stored_bytes == 4 * 97 * 32
    bits = dense_sizes(tied.to(torch.bfloat16)).bits_per_weight
    assert bits is not None and bits["total"] == bits["values"] == 16
    assert bits["codes"] == bits["scales"] == 0
