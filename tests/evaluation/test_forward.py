from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from rarefy.core.errors import OptionError
from rarefy.evaluation.candidates import Candidate
from rarefy.evaluation.forward import forward
from rarefy.evaluation.journal import Journal, fingerprint
from rarefy.evaluation.protocol import Protocol
from rarefy.evaluation.runner import evaluate
from tests.caches import bad_cache, perfect_cache

Build = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize("chunk", [1, 7, 24, 100])
def test_chunks_through_the_dense_cache_change_nothing(tiny: Build, windows: torch.Tensor, chunk: int) -> None:
    model = tiny()
    whole = forward(model, windows)
    assert torch.allclose(forward(model, windows, chunk=chunk), whole, atol=1e-4)
    assert torch.allclose(forward(model, windows, chunk=chunk, cache=perfect_cache), whole, atol=1e-4)


def test_a_bad_cache_shows_only_where_it_is_read(tiny: Build, windows: torch.Tensor) -> None:
    model = tiny()
    whole, bad = forward(model, windows), forward(model, windows, chunk=8, cache=bad_cache)
    assert torch.allclose(bad[:, :8], whole[:, :8], atol=1e-4)
    assert (bad[:, 8:] - whole[:, 8:]).abs().mean() > 0.1
    with pytest.raises(OptionError, match="give chunk="):
        forward(model, windows, cache=bad_cache)


def test_perplexity_and_divergence_tell_a_bad_cache_from_a_perfect_one(tiny: Build, windows: torch.Tensor) -> None:
    model = tiny()
    caches = {"perfect": perfect_cache, "bad": bad_cache}
    candidates = [Candidate(name, model, cache=cache) for name, cache in caches.items()]
    found = evaluate(candidates, windows, Protocol(chunk=8), reference=Candidate("dense", model))
    perfect, bad = found.candidates
    assert perfect.kl is not None and bad.kl is not None and bad.top1_agreement is not None
    assert perfect.kl < 1e-6 and perfect.top1_agreement == 1 and bad.kl > 0.05 and bad.top1_agreement < 1
    assert perfect.protocol.chunk == 8 and "in chunks of 8" in perfect.protocol.describe()


def test_a_journal_gives_back_what_it_was_given(tmp_path: Path) -> None:
    key = {"task": "a", "limit": (1, None)}
    journal = Journal(tmp_path / "work")
    assert journal.take(key) is None
    journal.keep(key, {"score": 0.1})
    assert Journal(tmp_path / "work").take(key) == {"score": 0.1}
    assert journal.take({**key, "task": "b"}) is None
    next((tmp_path / "work").iterdir()).write_text("{")
    with pytest.raises(OptionError, match=r"is damaged; delete it\."):
        journal.take(key)
    nothing = Journal(None)
    nothing.keep(key, 1)
    assert nothing.take(key) is None and not nothing.keeps


def test_a_changed_model_has_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "config.json").write_text("{ }")
    assert fingerprint(tmp_path) != before
