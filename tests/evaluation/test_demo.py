"""The real model on the real text."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rarefy.evaluation.candidates import Candidate, dense_sizes
from rarefy.evaluation.protocol import Protocol, bos_token
from rarefy.evaluation.runner import evaluate
from rarefy.sources.models import open_model
from rarefy.sources.texts import open_text
from rarefy.sources.windows import tokenize, windows


@pytest.mark.demo
def test_demo_perplexity_equals_the_loss_of_transformers() -> None:
    source, text = open_model("demo"), open_text("demo", "evaluation")
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    assert bos_token(tokenizer, None) is None
    tokens = windows(tokenize(tokenizer, text.text), 128, 2, None)
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    protocol = Protocol(context=128, windows=2, bos=False, text=text.name, form=text.form)
    dense = Candidate(source.name, model, sizes=dense_sizes(model))
    comparison = evaluate([dense], tokens, protocol, reference=dense)
    result = comparison.candidates[0]
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert 5 < result.perplexity < 60
    assert (result.kl, result.top1_agreement, result.tokens) == (0, 1, 254)
    assert result.bits_per_weight is not None and result.bits_per_weight["total"] == 32
