"""Caches are told apart in every regime, and what is measured is what the regime says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import rarefy
from rarefy.core.errors import OptionError
from rarefy.evaluation.caches import CacheProtocol, compare_caches
from rarefy.integrations.transformers.kv_evaluation import parse_cache
from rarefy.integrations.transformers.kv_setup import KvSetup, kv_recipe, prepare_
from rarefy.recipes import discover
from tests.zoo import tiny_tokenizer

discover()
REGIMES: dict[str, dict[str, Any]] = {
    "chunked": {"regime": "chunked", "chunk": 4},
    "decode": {"regime": "decode", "prefill": 9},
    "distorted": {"regime": "distorted"},
}


def setup(name: str, **options: Any) -> KvSetup:
    return KvSetup(name, kv_recipe(name, options))


def measured(model: Any, windows: torch.Tensor, regime: str, batch_size: int = 1) -> Any:
    prepare_(model)
    makers = {
        "fine": setup("kivi", num_bits=8, group_size=4, residual=4),
        "rough": setup("kivi", num_bits=1, group_size=4, residual=4),
        "identity": setup("identity"),
    }
    protocol = CacheProtocol(context=windows.shape[1], windows=len(windows), dtype="", **REGIMES[regime])
    return compare_caches(model, "tiny", windows, makers, protocol, batch_size)


@pytest.mark.parametrize("regime", REGIMES)
def test_rough_codes_are_worse_than_fine_ones(
    regime: str, tiny: Callable[..., Any], windows: torch.Tensor
) -> None:
    result = measured(tiny(), windows, regime)
    fine, rough, identity = result.caches
    assert rough.kl > 20 * fine.kl > 0
    assert identity.kl < 1e-6 and abs(identity.nll - result.dense_nll) < 1e-5
    assert fine.bits["total"] > rough.bits["total"] + 3
    assert identity.bits["total"] == 16  # of a model in float32, as if in 16 bits
    assert fine.gap is not None and fine.gap.value == pytest.approx(fine.nll - result.dense_nll)
    assert fine.versus_first is None
    assert rough.versus_first is not None
    assert rough.versus_first.value == pytest.approx(rough.nll - fine.nll)
    skipped = 9 if regime == "decode" else 0
    assert result.tokens == len(windows) * (windows.shape[1] - 1 - skipped)


@pytest.mark.parametrize("regime", REGIMES)
def test_windows_may_go_through_together(regime: str, tiny: Callable[..., Any], windows: torch.Tensor) -> None:
    one, many = (measured(tiny(), windows, regime, size) for size in (1, 2))
    assert many.tokens == one.tokens and many.dense_nll == pytest.approx(one.dense_nll, rel=1e-6)
    for alone, together in zip(one.caches, many.caches, strict=True):
        assert together.nll == pytest.approx(alone.nll, rel=1e-5)
        assert together.kl == pytest.approx(alone.kl, rel=1e-3, abs=1e-6)
        assert together.bits == alone.bits


def test_the_dense_loss_is_that_of_whole_windows(tiny: Callable[..., Any], windows: torch.Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        logits = model(windows).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert measured(model, windows, "chunked").dense_nll == pytest.approx(float(expected), rel=1e-5)
    tail = torch.nn.functional.cross_entropy(logits[:, 9:-1].flatten(0, 1), windows[:, 10:].flatten())
    assert measured(model, windows, "decode").dense_nll == pytest.approx(float(tail), rel=1e-5)


def test_a_regime_that_leaves_nothing_is_refused(tiny: Callable[..., Any], windows: torch.Tensor) -> None:
    protocol = CacheProtocol(regime="decode", prefill=windows.shape[1] - 1, context=9, windows=1, dtype="")
    with pytest.raises(OptionError, match="Nothing is left to decode after"):
        compare_caches(tiny(), "tiny", windows, {}, protocol)


def test_caches_as_people_write_them() -> None:
    assert parse_cache("fp8") == ("fp8", {})
    assert parse_cache("kivi:num_bits=2,group_size=32") == ("kivi", {"num_bits": 2, "group_size": 32})
    assert parse_cache("kv_quant:rotated_keys=true,data=a.txt")[1] == {"rotated_keys": True, "data": "a.txt"}
    with pytest.raises(OptionError, match="--kv 'kivi:2' is not of the form"):
        parse_cache("kivi:2")
    with pytest.raises(OptionError, match="Name at least one KV cache"):
        rarefy.compare_caches("demo", [])


def test_the_verb_measures_a_model_in_memory(tiny: Callable[..., Any], tmp_path: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 60)
    result = rarefy.compare_caches(
        tiny(vocab=96), ["identity", "kivi:num_bits=8,group_size=4,residual=4"], data=text, context=24, windows=3,
        chunk=8, tokenizer=tiny_tokenizer(),
    )  # fmt: skip
    assert [cache.name for cache in result.caches] == ["identity", "kivi:num_bits=8,group_size=4,residual=4"]
    assert result.protocol.describe().startswith("chunked, 8 tokens at a time; context 24, 3 windows, float32")


def test_a_setup_makes_the_cache_of_other_measurements(tiny: Callable[..., Any], tmp_path: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 60)
    model = tiny(vocab=96)
    result = rarefy.evaluate(
        model, reference=tiny(vocab=96), data=text, context=24, windows=3, chunk=8, tokenizer=tiny_tokenizer(),
        cache=setup("kivi", num_bits=2, group_size=4, residual=4),
    )  # fmt: skip
    assert result.kl is not None and result.kl > 1e-4
