"""Sparse plans in Transformers: dense at density 1 whatever is done with the model, and one executor as good as another
below it; state that follows the cache; checkpoints; refusals."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

import rarefy
from rarefy.core.errors import CheckpointError, OptionError, RecipeError, UnsupportedError
from rarefy.evaluation.forward import cache_argument
from rarefy.integrations.transformers.kv_cache import CodedCache
from rarefy.integrations.transformers.plan_setup import load_setup
from rarefy.integrations.transformers.reach import reach_of
from tests.zoo import VOCABULARY, family_of

pytestmark = pytest.mark.compat
LONG = {"max_position_embeddings": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LONG,
    "qwen2": {**LONG, "num_key_value_heads": 1},
    "qwen3": LONG,
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], **LONG},
    "mistral": {**LONG, "sliding_window": 24},
    "phi": LONG,  # partial rotary embedding
    "gpt2": {"n_positions": 256},
}
EVERYWHERE = {"dense_below": 0, "max_density": 1, "block_q": 8, "block_k": 8}


def build(family: str = "llama", **changes: Any) -> Any:
    model = family_of(family).build(**{**FAMILIES.get(family, {}), **changes})
    model.generation_config.pad_token_id = 0
    return model


def prompt(rows: int = 2, count: int = 60, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
    given = {} if cache is None else {cache_argument(model.forward): cache, "use_cache": True}
    with torch.no_grad():
        return model(input_ids=tokens, **given, **kwargs).logits


def in_chunks(model: Any, sizes: list[int], cache: Callable[[Any], Any] | None = None) -> Tensor:
    past = DynamicCache(config=model.config) if cache is None else cache(model)
    tokens = prompt(count=sum(sizes))
    return torch.cat([logits(model, part, past) for part in tokens.split(sizes, 1)], 1)


def left_padded(model: Any) -> Tensor:
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :13] = 0
    return logits(model, prompt(), attention_mask=mask)[mask.bool()]


def right_padded(model: Any) -> Tensor:
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 41:] = 0
    return logits(model, prompt(), attention_mask=mask)[mask.bool()]


def packed(model: Any) -> Tensor:
    places = torch.cat([torch.arange(25), torch.arange(35)])[None]
    return logits(model, prompt(1), position_ids=places, use_cache=False)


def generated(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(3)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :13] = 0
    return model.generate(prompt(), attention_mask=mask, max_new_tokens=20, **options)


def assisted(model: Any) -> Tensor:
    draft = build(seed=9)
    return model.generate(prompt(1), max_new_tokens=20, do_sample=False, assistant_model=draft)


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "one pass": lambda model: logits(model, prompt()),
    "left padding": left_padded,
    "right padding": right_padded,
    "packed": packed,
    "chunks": lambda model: in_chunks(model, [30, 1, 9, 20]),
    "chunks over a cache with state": lambda model: in_chunks(model, [30, 1, 9, 20], model_cache),
    "chunks in a fixed buffer": lambda model: in_chunks(
        model, [30, 1, 9, 20], lambda model: StaticCache(config=model.config, max_cache_len=80)
    ),
    "greedy": lambda model: generated(model, do_sample=False),
    "beams": lambda model: generated(model, do_sample=False, num_beams=3),
    "sampling": lambda model: generated(model, do_sample=True, top_k=20),
    "assisted": assisted,
}


def model_cache(model: Any) -> Any:
    from rarefy.integrations.transformers.kv_setup import SETUP, KvSetup, kv_recipe
    from rarefy.recipes import discover

    discover()
    return (getattr(model, SETUP, None) or KvSetup("identity", kv_recipe("identity", {})))(model)


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_that_keeps_all_is_dense(way: str) -> None:
    model = build()
    expected = WAYS[way](model)
    for name in ("oracle", "quest_pages"):
        own = {"dense_layers": (), "phases": "both"} if name == "quest_pages" else {}
        setup = rarefy.set_attention(model, name, density=1.0, **EVERYWHERE, **own)
        assert setup is not None
        found = WAYS[way](model)
        if expected.dtype == torch.int64:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert setup.report.density() == 1.0 and not setup.report.dense()
        rarefy.set_attention(model, None)
    torch.testing.assert_close(WAYS[way](model), expected)


WHOLE: dict[str, dict[str, Any]] = {
    "infllm_v2": {"density": 1.0, "local": 2, "size": 4, "stride": 2}, "sale": {"threshold": 0.0},
    "xattention": {"density": 1.0, "stride": 4}, "sparge": {"density": 1.0},
    "minference": {"vertical": 60, "slash": 60},
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("way", ["left padding", "packed", "chunks", "assisted"])
def test_whatever_finds_the_blocks_all_of_them_are_dense(way: str, name: str) -> None:
    model = build()
    expected = WAYS[way](model)
    setup = rarefy.set_attention(model, name, **EVERYWHERE, **WHOLE[name])
    assert setup is not None
    torch.testing.assert_close(WAYS[way](model), expected, rtol=1e-4, atol=1e-4)
    assert setup.report.density() == 1.0 and set(setup.report.dense()) <= {"not in decode"}


@pytest.mark.parametrize("way", WAYS)
def test_below_that_executors_agree(way: str) -> None:
    found = {}
    for executor in ("reference", "cpu", "auto"):
        model = build()
        setup = rarefy.set_attention(
            model, "quest_pages", density=0.4, dense_layers=(), phases="both", executor=executor, **EVERYWHERE
        )
        found[executor] = WAYS[way](model)
        assert setup is not None and 0.3 < setup.report.density() < 0.9
    if found["cpu"].dtype == torch.int64:
        assert torch.equal(found["cpu"], found["reference"])
    torch.testing.assert_close(found["cpu"], found["reference"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["auto"], found["cpu"])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_families_of_models(family: str) -> None:
    model = build(family)
    expected = {way: WAYS[way](model) for way in ("one pass", "left padding", "chunks", "greedy")}
    for name in ("sparge", "oracle"):
        assert rarefy.set_attention(model, name, density=1.0, **EVERYWHERE) is not None
        for way, dense in expected.items():
            torch.testing.assert_close(WAYS[way](model), dense, rtol=1e-4, atol=1e-4, msg=way)
        rarefy.set_attention(model, "dense")
    rarefy.set_attention(model, "random", density=0.3, **EVERYWHERE)
    assert not torch.allclose(logits(model, prompt()), expected["one pass"], atol=1e-3)


PLANS = {
    "sink_local": {"density": 0.4}, "random": {"density": 0.4}, "oracle": {"density": 0.4}, "sparge": {"mass": 0.7},
    "quest_pages": {"density": 0.4, "dense_layers": (), "phases": "both"}, "xattention": {"mass": 0.5, "stride": 4},
    "minference": {"vertical": 6, "slash": 6},
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("heads", ["query", "kv"])
def test_every_plan_sees_a_block_for_every_query(name: str, heads: str) -> None:
    model = build()
    setup = rarefy.set_attention(model, name, heads=heads, **EVERYWHERE, **PLANS[name])
    assert setup is not None
    setup.report.keep_maps = True
    assert bool(torch.isfinite(left_padded(model)).all())
    for block_map in setup.report.maps.values():
        block_map.check()  # type: ignore[attr-defined]
        assert block_map.count.shape[1] == (4 if heads == "query" else 2)  # type: ignore[attr-defined]
    assert setup.report.density() <= 1.0


def test_a_mass_of_all_is_dense() -> None:
    model = build()
    expected = logits(model, prompt())
    for name, options in (("xattention", {"mass": 1.0, "stride": 4}), ("minference", {"vertical": 60, "slash": 60})):
        rarefy.set_attention(model, name, **EVERYWHERE, **options)
        torch.testing.assert_close(logits(model, prompt()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["quest_pages", "sparge"])
def test_state_follows_the_cache(name: str) -> None:
    """Cropped, reordered and forked caches decode as if their tokens had come in one pass."""
    model = build()
    own = {"phases": "both", "dense_layers": ()} if name == "quest_pages" else {"similarity": 0.1}
    setup = rarefy.set_attention(model, name, density=0.4, **EVERYWHERE, **own)
    assert setup is not None
    tokens, more = prompt(), prompt(2, 5, seed=4)
    cache = model_cache(model)
    assert isinstance(cache, CodedCache)
    logits(model, tokens, cache)
    state = cache.coded_layers[0].store.state
    assert state and all(tensor.shape[2] == 60 // 8 for each in state.values() for tensor in each.tensors.values())
    cache.crop(-17)
    logits(model, prompt(2, 9, seed=5), cache)
    without = cache.fork()
    for layer in without.coded_layers:
        layer.store.state = {}  # so that all is made anew from the keys
    fork = cache.fork()
    expected = logits(model, more, without)
    torch.testing.assert_close(logits(model, more, cache), expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(cache.coded_layers, without.coded_layers, strict=True):
        for label, each in other.store.state.items():
            for part, tensor in each.tensors.items():
                torch.testing.assert_close(one.store.state[label].tensors[part], tensor, rtol=1e-4, atol=1e-5)
    fork.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(logits(model, more.flip(0), fork).flip(0), expected, rtol=1e-4, atol=1e-4)


def test_state_goes_to_disk_with_the_cache(tmp_path: Path) -> None:
    from rarefy.integrations.transformers.kv_files import load_cache, save_cache
    from rarefy.integrations.transformers.kv_setup import SETUP

    model = build()
    rarefy.set_attention(model, "quest_pages", density=0.4, dense_layers=(), **EVERYWHERE)
    cache = model_cache(model)
    logits(model, prompt(), cache)
    logits(model, prompt(2, 1), cache)
    save_cache(cache, tmp_path / "prefix.safetensors", model)
    back = load_cache(tmp_path / "prefix.safetensors", model, getattr(model, SETUP))
    assert back.coded_layers[1].store.state.keys() == cache.coded_layers[1].store.state.keys() != set()
    more = prompt(2, 1, seed=6)
    torch.testing.assert_close(logits(model, more, back), logits(model, more, cache))


def test_a_plan_reads_a_cache_in_code() -> None:
    model = build()
    rarefy.kv_cache(model, "kivi", num_bits=8, group_size=4, residual=8)
    expected = in_chunks(model, [40, 1, 9, 10], model_cache)
    setup = rarefy.set_attention(model, "oracle", density=1.0, **EVERYWHERE)
    assert setup is not None
    torch.testing.assert_close(in_chunks(model, [40, 1, 9, 10], model_cache), expected, rtol=1e-3, atol=1e-3)
    rarefy.set_attention(model, None)
    assert isinstance(model_cache(model), CodedCache)  # it was not the plan that brought it


def test_policy_says_where_attention_stays_dense() -> None:
    model = build()
    expected = logits(model, prompt())

    def reasons(**options: Any) -> dict[str, int]:
        setup = rarefy.set_attention(model, "random", **{**EVERYWHERE, "density": 0.2, **options})
        assert setup is not None
        found = logits(model, prompt())
        if sum(setup.report.dense().values()) == 2:
            torch.testing.assert_close(found, expected)
        return dict(setup.report.dense())

    assert reasons() == {}
    assert reasons(dense_below=61) == {"below 61 keys": 2}
    assert reasons(dense_layers=(-1,)) == {"dense layer": 1}
    assert reasons(phases="decode") == {"not in prefill": 2}
    assert reasons(density=0.8, max_density=0.5) == {"denser than 0.5": 2}


@pytest.mark.parametrize(
    ("name", "options"), [("random", {"density": 0.5}), ("sparge", {"mass": 0.3, "similarity": -1.0})]
)
def test_just_above_the_limit_is_dense_and_just_below_is_not(name: str, options: dict[str, Any]) -> None:
    """Of a rule whose density is known beforehand, and of one whose density the scores decide."""
    model = build()
    free = rarefy.set_attention(model, name, **{**EVERYWHERE, **options})
    assert free is not None
    sparse = logits(model, prompt())
    rarefy.set_attention(model, None)
    dense = logits(model, prompt())
    found = {layer: own.density() for layer, own in free.report.layers.items()}
    edge = 0.5 if name == "random" else max(found.values())
    for limit, expected in ((edge + 1e-4, sparse), (min(found.values()) - 1e-4 if edge != 0.5 else edge - 1e-4, dense)):
        setup = rarefy.set_attention(model, name, **{**EVERYWHERE, **options, "max_density": limit})
        assert setup is not None
        torch.testing.assert_close(logits(model, prompt()), expected)
        assert sum(setup.report.dense().values()) == (0 if expected is sparse else 2)


def test_dense_heads_and_last_rows_are_kept_whole() -> None:
    model = build()
    setup = rarefy.set_attention(model, "random", density=0.1, dense_heads=((1, 2),), last_rows=2, **EVERYWHERE)
    assert setup is not None
    setup.report.keep_maps = True
    logits(model, prompt())
    some = torch.ones(8, 8).tril().bool()
    keep = setup.report.maps[1].dense()  # type: ignore[attr-defined]
    assert torch.equal(keep[0, 2], some) and not torch.equal(keep[0, 1], some)
    assert torch.equal(keep[0, 1, -2:], some[-2:])
    assert not torch.equal(setup.report.maps[0].dense()[0, 2], some)  # type: ignore[attr-defined]


def test_last_rows_are_those_of_a_prompt_and_not_of_each_token_after_it() -> None:
    model = build()
    setup = rarefy.set_attention(model, "random", density=0.1, last_rows=2, **{**EVERYWHERE, "phases": "decode"})
    assert setup is not None
    model.generate(prompt(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert setup.report.dense() == {"not in prefill": 2} and setup.report.density() < 0.4


def test_a_copy_of_a_model_has_its_own_plan() -> None:
    model = build()
    expected = logits(model, prompt())
    rarefy.set_attention(model, "random", density=0.2, **EVERYWHERE)
    twin = copy.deepcopy(model)
    rarefy.set_attention(model, None)
    torch.testing.assert_close(logits(model, prompt()), expected)
    assert not torch.allclose(logits(twin, prompt()), expected, atol=1e-3)


def test_a_checkpoint_says_how_its_model_attends(tmp_path: Path) -> None:
    model = build()
    rarefy.compress(model, "rtn", options={"num_bits": 8, "group_size": 12})
    rarefy.set_attention(model, "sparge", density=0.4, **EVERYWHERE)
    expected = logits(model, prompt())
    rarefy.save(model, tmp_path / "small")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(back, prompt()), expected)
    rarefy.save(back, tmp_path / "again")
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("small", "again"))
    assert first["quantization_config"] == again["quantization_config"]
    assert first["quantization_config"]["attention"]["recipe"] == "sparge"
    text = (tmp_path / "small" / "config.json").read_text()
    (tmp_path / "small" / "config.json").write_text(text.replace('"recipe": "sparge"', '"recipe": "sparger"'))
    with pytest.raises(CheckpointError, match="attention recipe 'sparger' is unknown"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_dense_model_with_a_plan_is_a_checkpoint_too(tmp_path: Path) -> None:
    model = build()
    rarefy.set_attention(model, "oracle", density=0.4, **EVERYWHERE)
    expected = logits(model, prompt())
    rarefy.save(model, tmp_path / "planned")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "planned")
    assert torch.equal(logits(back, prompt()), expected)


def test_encoders_attend_both_ways_by_a_plan() -> None:
    model = family_of("bert_labels").build(max_position_embeddings=128)
    expected = logits(model, prompt(count=50))
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, 33:] = 0
    padded = logits(model, prompt(count=50), attention_mask=mask)
    setup = rarefy.set_attention(model, "oracle", density=1.0, **EVERYWHERE)
    assert setup is not None
    setup.report.keep_maps = True
    torch.testing.assert_close(logits(model, prompt(count=50)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, prompt(count=50), attention_mask=mask), padded, rtol=1e-4, atol=1e-4)
    assert not setup.report.maps[0].reach.causal  # type: ignore[attr-defined]


def test_masks_are_recognized() -> None:
    causal = torch.ones(2, 1, 6, 10, dtype=torch.bool).tril(4)
    found = reach_of(causal, 6, 10, True, None)
    assert found.plain and found.offset == 4 and found.causal
    padded = causal.clone()
    padded[1, :, :, :3] = False
    found = reach_of(padded, 6, 10, True, None)
    assert found.first is not None and found.first.tolist() == [0, 3] and found.stop is None
    assert found is reach_of(padded, 6, 10, True, None)  # once for all layers
    additive = torch.where(padded, 0.0, torch.finfo(torch.float32).min)
    assert reach_of(additive, 6, 10, True, None).first is not None
    strange = causal.clone()
    strange[0, 0, 3, 2] = False
    found = reach_of(strange, 6, 10, True, None)
    assert found.mask is not None and torch.equal(found.mask, strange)
    with pytest.raises(UnsupportedError, match="adds a bias to attention scores"):
        reach_of(torch.randn(1, 1, 6, 10), 6, 10, True, None)


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(RecipeError, match="Unknown attention recipe 'orakle'; did you mean 'oracle'"):
        rarefy.set_attention(model, "orakle")
    with pytest.raises(RecipeError, match="'densty' is not an option; did you mean 'density'"):
        rarefy.set_attention(model, "oracle", densty=0.1)
    with pytest.raises(OptionError, match="Unknown attention executor 'flesh'"):
        rarefy.set_attention(model, "oracle", executor="flesh")
    with pytest.raises(UnsupportedError, match="An attention plan needs a model of Transformers with one stack"):
        rarefy.set_attention(family_of("t5").build(), "oracle")
    rarefy.set_attention(model, "xattention", stride=3, **EVERYWHERE)
    with pytest.raises(UnsupportedError, match="stride of 3 does not divide blocks of 8 by 8"):
        logits(model, prompt())
    rarefy.set_attention(model, "oracle", executor="fa4", **EVERYWHERE)
    with pytest.raises(UnsupportedError, match="Executor 'fa4' cannot run this attention: it needs a Hopper GPU"):
        logits(model, prompt())
    rarefy.set_attention(model, "oracle", **EVERYWHERE)
    model.train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(UnsupportedError, match="cannot drop attention weights"):
        logits(model, prompt())
    (tmp_path / "gates.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        load_setup(tmp_path / "gates.safetensors")
