"""Coded caches in Transformers: every way to generate, every kind of layer and of rotary embedding, files, refusals."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import rarefy
from rarefy.core.errors import CheckpointError, OptionError, RecipeError, UnsupportedError
from rarefy.evaluation.forward import cache_argument
from rarefy.integrations.transformers.kv_cache import CodedCache, CodedLayer
from rarefy.integrations.transformers.kv_calibration import calibrate
from rarefy.integrations.transformers.kv_files import load_cache, save_cache
from rarefy.integrations.transformers.kv_setup import KvSetup, install_, kv_recipe, load_setup, prepare_
from rarefy.kv.codecs import Exact
from rarefy.kv.plan import HeadShape, LayerCodecs
from rarefy.kv.view import Handle
from rarefy.recipes import discover
from tests.zoo import VOCABULARY, family_of, same_bytes

pytestmark = pytest.mark.compat
discover()
LONG = {"max_position_embeddings": 256}
# Families whose layers keep all tokens, or some of whose layers do.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LONG),
    "qwen2": ("qwen2", LONG),
    "qwen3": ("qwen3", LONG),
    "gemma3": ("gemma3", {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma2": ("gemma2", {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("mistral", {"sliding_window": None, **LONG}),
    "phi": ("phi", LONG),  # partial rotary embedding
    "gpt2": ("gpt2", {}),
}
# Recipes that are close to lossless on tiny random models.
FINE: dict[str, tuple[str, dict[str, Any]]] = {
    "kivi": ("kivi", {"num_bits": 8, "group_size": 4, "residual": 8}),
    "turbo_quant": ("turbo_quant", {"num_bits": 8}),
    "gear": ("gear", {"num_bits": 8, "group_size": 4, "block": 8}),
    "kv_quant": ("kv_quant", {"num_bits": 8, "outliers": 0.05, "importance": "equal"}),
    "million": ("million", {"width": 1, "code_bits": 8, "block": 8}),
}


def build(name: str, **changes: Any) -> Any:
    family, own = FAMILIES[name]
    model = family_of(family).build(**{**own, **changes})
    model.generation_config.pad_token_id = 0
    return model


def prompt(rows: int = 2, count: int = 40, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def use(model: Any, recipe: str = "identity", **options: Any) -> KvSetup:
    setup = KvSetup(recipe, kv_recipe(recipe, options))
    install_(model, setup)
    return setup


def logits(model: Any, tokens: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
    given = {} if cache is None else {cache_argument(model.forward): cache, "use_cache": True}
    with torch.no_grad():
        return model(input_ids=tokens, **given, **kwargs).logits


def in_chunks(model: Any, tokens: Tensor, cache: Any, sizes: list[int]) -> Tensor:
    return torch.cat([logits(model, part, cache) for part in tokens.split(sizes, 1)], 1)


class BeforeRope:
    """A setup that keeps keys exactly, but without RoPE."""

    def __call__(self, model: Any) -> CodedCache:
        return CodedCache(model.config, self.plan)

    def plan(self, shape: HeadShape) -> LayerCodecs:
        exact = Exact(shape.dtype, 4)
        return LayerCodecs(exact, exact, pre_rope=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_blocks_give_what_the_dense_cache_gives(family: str) -> None:
    model, tokens = build(family), prompt()
    dense = in_chunks(model, tokens, DynamicCache(config=model.config), [30, 1, 9]) if family != "gemma2" else None
    setup = use(model)
    if dense is None:  # SDPA, which Transformers takes by default, ignores the softcap of this family
        model.set_attn_implementation("eager")
        dense = in_chunks(model, tokens, DynamicCache(config=model.config), [30, 1, 9])
        model.set_attn_implementation("rarefy")
    cache = setup(model)
    found = in_chunks(model, tokens, cache, [30, 1, 9])
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
    assert any(isinstance(layer, CodedLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gpt2", "gemma2")])
def test_rotary_embedding_is_undone_and_redone(family: str) -> None:
    model, tokens = build(family), prompt()
    dense = in_chunks(model, tokens, DynamicCache(config=model.config), [30, 1, 9])
    prepare_(model)
    found = in_chunks(model, tokens, BeforeRope()(model), [30, 1, 9])
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
        {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 1e4,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_scaled_rotary_embedding_is_undone_and_redone(rope: dict[str, Any]) -> None:
    model, tokens = build("llama", rope_parameters=rope), prompt()
    dense = in_chunks(model, tokens, DynamicCache(config=model.config), [30, 1, 9])
    prepare_(model)
    found = in_chunks(model, tokens, BeforeRope()(model), [30, 1, 9])
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)


def test_unknown_positions_are_refused_by_name() -> None:
    model = build("gpt2")
    prepare_(model)
    with pytest.raises(UnsupportedError, match="positions of layer 0 are not known"):
        logits(model, prompt(), BeforeRope()(model))
    recipe = kv_recipe("kv_quant", {"importance": "equal"})
    with pytest.raises(UnsupportedError, match=r"layer 0 is not one that can be undone; code rotated keys"):
        calibrate("kv_quant", recipe, model, [{"input_ids": prompt()}])


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "several": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("mode", GENERATE)
@pytest.mark.parametrize("padded", [False, True])
def test_every_way_to_generate(family: str, mode: str, padded: bool) -> None:
    model, tokens = build(family), prompt()
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :17] = 0

    def run() -> Tensor:
        torch.manual_seed(3)
        return model.generate(tokens, attention_mask=mask, max_new_tokens=20, **GENERATE[mode])

    dense = run()
    use(model)
    assert torch.equal(run(), dense)


@pytest.mark.parametrize("recipe", FINE)
@pytest.mark.parametrize("padded", [False, True])
def test_fine_codes_generate_what_the_dense_cache_does(recipe: str, padded: bool) -> None:
    model, tokens = build("llama"), prompt()
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :17] = 0
    dense = model.generate(tokens, attention_mask=mask, max_new_tokens=10, do_sample=False)
    id_, options = FINE[recipe]
    chosen = kv_recipe(id_, options)
    data = [{"input_ids": prompt(4, 60, seed=5)}]
    install_(model, calibrate(id_, chosen, model, data) if chosen.needs else KvSetup(id_, chosen))
    found = model.generate(tokens, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert (found == dense).float().mean() > 0.95


@pytest.mark.parametrize("recipe", ["identity", "kivi"])
def test_assisted_generation_takes_tokens_back(recipe: str) -> None:
    model, helper, tokens = build("llama"), build("llama", seed=4, num_hidden_layers=1), prompt(1)
    with torch.no_grad():  # a helper that is right now and then
        helper.load_state_dict(model.state_dict(), strict=False)
    use(model, recipe, **({} if recipe == "identity" else {"num_bits": 8, "group_size": 4, "residual": 8}))
    plain = model.generate(tokens, max_new_tokens=24, do_sample=False)
    assisted = model.generate(tokens, max_new_tokens=24, do_sample=False, assistant_model=helper)
    if recipe == "identity":
        assert torch.equal(assisted, plain)
    else:  # blocks that were taken back are coded again
        assert (assisted == plain).float().mean() > 0.9


def test_a_conversation_goes_on_and_forks() -> None:
    model, tokens = build("qwen3"), prompt(1)
    setup = use(model)
    name = cache_argument(type(model).forward)
    cache = setup(model)
    first = model.generate(tokens, max_new_tokens=8, do_sample=False, **{name: cache})
    fork = cache.fork()
    questions = [torch.cat([first, prompt(1, 5, seed)], 1) for seed in (11, 12)]
    answers = [
        model.generate(q, max_new_tokens=8, do_sample=False, **{name: own})
        for q, own in zip(questions, (cache, fork), strict=True)
    ]
    rarefy.kv_cache(model, None)
    for question, answer in zip(questions, answers, strict=True):
        assert torch.equal(model.generate(question, max_new_tokens=8, do_sample=False), answer)


def test_rows_are_repeated_chosen_moved_and_reset() -> None:
    model, tokens = build("gemma3"), prompt()
    setup = use(model, "kivi", group_size=4, residual=8)
    cache = setup(model)
    logits(model, tokens, cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.layers[1].offload()
    cache.layers[1].prefetch()
    other = setup(model)
    logits(model, tokens[[1, 0]], other)
    more = prompt(2, 3, seed=9)
    torch.testing.assert_close(logits(model, more, cache), logits(model, more, other), rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_reset_is_empty() -> None:
    model, tokens = build("llama"), prompt()
    setup = use(model, "kivi", group_size=4, residual=8)
    cache = setup(model)
    logits(model, prompt(2, 30, seed=9), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = in_chunks(model, tokens, setup(model), [39, 1])
    torch.testing.assert_close(in_chunks(model, tokens, cache, [39, 1]), fresh)


def test_models_and_threads_do_not_meet() -> None:
    models = [build("llama", seed=seed) for seed in range(3)]
    tokens = prompt()
    alone = []
    for model, recipe in zip(models, ("identity", "kivi", "fp8"), strict=True):
        use(model, recipe, **({"group_size": 4, "residual": 8, "num_bits": 2} if recipe == "kivi" else {}))
        alone.append(model.generate(tokens, max_new_tokens=12, do_sample=False))
    untouched = build("llama", seed=1)
    assert type(logits_cache(untouched, tokens)) is DynamicCache
    together: dict[int, Tensor] = {}

    def run(index: int) -> None:
        together[index] = models[index % 3].generate(tokens, max_new_tokens=12, do_sample=False)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[index], alone[index % 3]) for index in range(6))


def logits_cache(model: Any, tokens: Tensor) -> Any:
    with torch.no_grad():
        output = model(input_ids=tokens, use_cache=True)
    return output.cache if "cache" in output else output.past_key_values


def test_forward_passes_and_copies_have_caches_of_their_own() -> None:
    model, tokens = build("llama"), prompt()
    use(model, "kivi", group_size=4, residual=8)
    assert isinstance(logits_cache(model, tokens), CodedCache)
    twin = copy.deepcopy(model)
    rarefy.kv_cache(model, None)
    assert isinstance(logits_cache(twin, tokens), CodedCache)
    assert type(logits_cache(model, tokens)) is DynamicCache
    assert twin.generate.__self__ is twin
    given = DynamicCache(config=twin.config)
    logits(twin, tokens, given)
    assert type(given.layers[0]).__name__ == "DynamicLayer"  # the caller's own cache is left as it is


def test_skipped_layers_keep_everything() -> None:
    model = build("llama", num_hidden_layers=3)
    cache = use(model, "kivi", group_size=4, residual=8, skip_layers=(0, -1))(model)
    logits(model, prompt(), cache)
    kinds = [type(layer.store.codecs.keys).__name__ for layer in cache.coded_layers]
    assert kinds == ["Exact", "Gridded", "Exact"]


def test_bits_are_measured() -> None:
    model = build("llama", head_dim=32)
    cache = use(model, "kivi", num_bits=4, group_size=32, residual=32)(model)
    logits(model, prompt(2, 160), cache)
    # keys: 4 bits and two 16-bit numbers for 32 codes; values: as many, and the last 32 of 160 tokens exact, in float32
    assert cache.bits()["total"] == pytest.approx(((4 + 1) + (0.8 * (4 + 1) + 0.2 * 32)) / 2)
    assert cache.bits(exact=16)["total"] == pytest.approx(((4 + 1) + (0.8 * (4 + 1) + 0.2 * 16)) / 2)
    assert cache.nbytes().codes > 0 and cache.shared_bytes() == 0
    with pytest.raises(OptionError, match="Layer 0 of this cache is still empty"):
        _ = use(model)(model).coded_layers[0].store


def test_caches_go_to_disk_and_back(tmp_path: Path) -> None:
    model, tokens = build("gemma3"), prompt()
    setup = use(model, "kivi", group_size=4, residual=8)
    cache = setup(model)
    logits(model, tokens, cache)
    save_cache(cache, tmp_path / "prefix.safetensors", model)
    back = load_cache(tmp_path / "prefix.safetensors", model, setup)
    more = prompt(2, 5, seed=9)
    assert torch.equal(logits(model, more, back), logits(model, more, cache))
    with pytest.raises(CheckpointError, match="another KV cache recipe"):
        load_cache(tmp_path / "prefix.safetensors", model, KvSetup("fp8", kv_recipe("fp8", {})))
    other = build("gemma3", seed=3)
    with pytest.raises(CheckpointError, match="cache of another model than this Gemma3ForCausalLM"):
        load_cache(tmp_path / "prefix.safetensors", other, setup)


def test_parameters_go_to_disk_and_back(tmp_path: Path) -> None:
    model = build("llama")
    data = [{"input_ids": prompt(4, 60, seed=5)}]
    setup = rarefy.kv_cache(model, "kv_quant", data=data, num_bits=3)
    assert setup is not None
    setup.save(str(tmp_path / "kv.safetensors"))  # as people write it
    back = load_setup(tmp_path / "kv.safetensors", build("llama").to(torch.bfloat16).float())
    assert back.describe() == setup.describe()
    for layer, params in setup.params.items():
        assert same_bytes(params, back.params[layer])
    rarefy.kv_cache(model, "kv_quant", params=tmp_path / "kv.safetensors")
    with pytest.raises(CheckpointError, match="calibrated on another model than this LlamaForCausalLM"):
        rarefy.kv_cache(build("llama", seed=2), "kv_quant", params=tmp_path / "kv.safetensors")
    with pytest.raises(OptionError, match="holds recipe 'kv_quant' with options of its own"):
        rarefy.kv_cache(model, "million", params=tmp_path / "kv.safetensors")


def test_bits_are_shared_out_between_layers_and_sides(tmp_path: Path) -> None:
    model = build("llama")
    data = [{"input_ids": prompt(4, 60, seed=5)}]
    setup = rarefy.kv_cache(model, "kv_quant", data=data, mean_bits=3)
    assert setup is not None
    widths = [len(own[f"{side}.lut"]) for own in setup.params.values() for side in ("keys", "values")]
    assert set(widths) <= {4, 8, 16} and len(set(widths)) > 1
    assert sum(width.bit_length() - 1 for width in widths) <= 3 * len(widths)
    assert not any(name[0].isdigit() for own in setup.params.values() for name in own)
    spared = rarefy.kv_cache(build("llama"), "kv_quant", data=data, mean_bits=3, skip_layers=[0])
    assert spared is not None
    assert [layer for layer, own in spared.params.items() if own] == list(setup.params)[1:]
    alike = rarefy.kv_cache(build("llama"), "kv_quant", data=data, num_bits=3)
    assert alike is not None

    def cost(of: KvSetup) -> float:
        return sum(float(own[f"{side}.cost"]) for own in of.params.values() for side in ("keys", "values"))

    assert cost(setup) < cost(alike)
    cache = setup(model)
    logits(model, prompt(2, 70), cache)
    setup.save(tmp_path / "kv.safetensors")
    again = load_setup(tmp_path / "kv.safetensors", model)(model)
    logits(model, prompt(2, 70), again)
    for one, other in zip(cache.coded_layers, again.coded_layers, strict=True):
        assert same_bytes(one.store.tensors(), other.store.tensors())


@pytest.mark.parametrize("recipe", ["kivi", "million"])
def test_a_checkpoint_says_how_its_cache_is_stored(recipe: str, tmp_path: Path) -> None:
    model, tokens = build("llama"), prompt()
    rarefy.compress(model, "rtn", options={"num_bits": 8, "group_size": 12})
    options = FINE[recipe][1]
    rarefy.kv_cache(model, recipe, data=[{"input_ids": prompt(4, 60, seed=5)}], **options)
    expected = model.generate(tokens, max_new_tokens=10, do_sample=False)
    rarefy.save(model, tmp_path / "small")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert isinstance(logits_cache(back, tokens), CodedCache)
    assert torch.equal(back.generate(tokens, max_new_tokens=10, do_sample=False, pad_token_id=0), expected)
    rarefy.save(back, tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert ("kv.safetensors" in names) == (recipe == "million")
    for name in (name for name in names if name.endswith(".safetensors")):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "small" / name).read_bytes(), name
    back.save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert isinstance(logits_cache(plain, tokens), CodedCache) == (recipe == "kivi")
    if recipe == "million":
        (tmp_path / "small" / "kv.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"kv.safetensors"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_the_attention_can_be_named_when_a_model_is_loaded(tmp_path: Path) -> None:
    model, tokens = build("llama"), prompt()
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="rarefy")
    torch.testing.assert_close(logits(back, tokens), logits(model, tokens))


def test_gradients_by_keys_before_rope_are_those_of_the_loss() -> None:
    """Also where the rotary factor is not one: what the projection of keys puts out is a key before RoPE."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    model, tokens = build("llama", rope_parameters=rope), prompt(1, 12)
    seen: list[Any] = []

    class Spy(type(kv_recipe("kv_quant", {}))):  # type: ignore[misc]
        def fit(self, samples: Any) -> dict[str, Tensor]:
            seen.append(samples)
            return {}

    calibrate("kv_quant", Spy(sink=0), model, [{"input_ids": tokens}])
    assert all(parameter.requires_grad for parameter in model.parameters())
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(keep)
    found = model(input_ids=tokens).logits[0, :-1]
    torch.nn.functional.cross_entropy(found, tokens[0, 1:], reduction="sum").backward()
    for samples, output in zip(seen, kept, strict=True):
        torch.testing.assert_close(samples.keys.flatten(1), output[0].detach(), rtol=1e-4, atol=1e-5)
        assert output.grad is not None
        torch.testing.assert_close(samples.key_weight.flatten(1), output.grad[0].square(), rtol=1e-3, atol=1e-12)


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(UnsupportedError, match="No layer of this MistralConfig keeps all tokens"):
        KvSetup("fp8", kv_recipe("fp8", {}))(family_of("mistral").build())
    with pytest.raises(UnsupportedError, match="needs a decoder of Transformers"):
        rarefy.kv_cache(family_of("t5").build(), "fp8")
    with pytest.raises(RecipeError, match="Unknown KV cache recipe 'kivy'; did you mean 'kivi'"):
        rarefy.kv_cache(build("llama"), "kivy")
    with pytest.raises(RecipeError, match="did you mean 'num_bits'"):
        rarefy.kv_cache(build("llama"), "kivi", num_bit=2)
    with pytest.raises(RecipeError, match="residual 100 is no multiple of group_size 32"):
        kv_recipe("kivi", {"residual": 100})
    model = build("llama")
    cache = use(model, "fp8")(model)
    logits(model, prompt(), cache)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="only the 'rarefy' attention reads"):
        logits(model, prompt(2, 1), cache)
    handle = Handle(cache.coded_layers[0].store, torch.zeros(2, 2, 1, 12))
    assert tuple(handle.shape) == (2, 2, cache.get_seq_length(), 12)
