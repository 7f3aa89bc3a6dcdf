"""The program of every family computes what the model's own forward does, or the model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.decoding.build import build
from rarefy.decoding.cache import FLOAT8, KeyValues
from rarefy.decoding.interpreter import run
from rarefy.decoding.program import Attend, Cap, Embed, Norm, Program, Rotate
from tests.decoding.models import DECODERS, build_model, compress, prompt

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def empty_cache(program: Program, dtype: torch.dtype = torch.float32) -> KeyValues:
    return KeyValues(program.layers, program.kv_heads, program.head_dim, dtype, program.positions)


def in_pieces(program: Program, tokens: Tensor, sizes: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of all ``tokens``, put through the program in chunks of ``sizes``."""
    cache = empty_cache(program, dtype)
    return torch.cat([run(program, part, cache, every=True) for part in tokens.split(sizes)])


def expected(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens[None]).logits[0]


def check(model: Any, tolerance: float = 2e-5) -> Program:
    """Prefill, a second chunk, then one token at a time, beyond every window."""
    tokens = prompt(24)
    program, wanted = build(model), expected(model, tokens)
    got = in_pieces(program, tokens, [9, 5, *[1] * 10])
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    return program


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "compressed"])
def test_logits_of_the_model(family: str, compressed: bool) -> None:
    model = build_model(family)
    check(compress(model) if compressed else model)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"head_dim": 16}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"rms_norm_eps": 0.1}),
        ("llama", {"sliding_window": 4}),  # which a Llama never reads
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"attn_implementation": "eager"}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True}),
        ("gemma", {"hidden_act": "gelu_pytorch_tanh"}),
        ("gemma2", {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma3", {"final_logit_softcapping": 3.0}),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_variants_are_right(family: str, changes: dict[str, Any]) -> None:
    check(build_model(family, **changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(dtype: torch.dtype) -> None:
    check(build_model("qwen3").to(dtype), 0.03)


def test_a_compressed_head_apart_from_its_embedding() -> None:
    model = compress(build_model("llama"), "lm_head")
    assert "Compressed" in type(model.lm_head).__name__
    check(model)


def test_what_a_program_says_of_a_model() -> None:
    program = build(build_model("gemma2", attn_logit_softcapping=20.0))
    embed = program.step[0]
    assert isinstance(embed, Embed) and embed.scale == 48**0.5
    norms = [operation for operation in program.operations if isinstance(operation, Norm)]
    assert len(norms) == 2 * 4 + 1 and all(norm.centred for norm in norms)
    attends = [operation for operation in program.step if isinstance(operation, Attend)]
    assert [attend.window for attend in attends] == [8, None] and attends[0].softcap == 20.0
    assert program.head[-1] == Cap("logits", 30.0)
    assert len(program.projections()) == 2 * 7 + 1
    assert sum(isinstance(operation, Rotate) for operation in program.step) == 4
    assert program.buffers == {
        "hidden": 48, "normed": 48, "branch": 48, "q": 48, "k": 24, "v": 24, "mixed": 48, "gate": 80, "up": 80,
        "logits": 96,
    }  # fmt: skip


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 5e-3), (FLOAT8, 0.2)])
def test_a_smaller_cache_stays_close(dtype: torch.dtype, most: float) -> None:
    model, tokens = build_model("llama"), prompt(24)
    wanted = expected(model, tokens)
    got = in_pieces(build(model), tokens, [20, 1, 1, 1, 1], dtype)
    assert 0 < (got - wanted).abs().max() < most * wanted.abs().max()


def test_eight_bits_have_a_step_for_each_position_and_head() -> None:
    cache = KeyValues(2, 3, 16, FLOAT8, 1000)
    cache.reserve(10)
    keys, values = torch.randn(2, 3, 5, 16)
    keys[0], values[1, 2] = keys[0] * 1e4, 0.0
    for start in (4, 252):
        cache.reserve(start + 5)
        cache.store(1, start, keys, values)
        for kept, x in zip(cache.kept[1].load(start + 5, torch.float32), (keys, values), strict=True):
            error = (kept[:, start:] - x).abs()
            assert bool((error <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) * 2**-16).all())
    assert cache.steps is not None and bool(cache.steps.isfinite().all())
    assert cache.byte_count() == 2 * 2 * 3 * cache.capacity * (16 + 2)


def test_cropping_the_cache_forgets() -> None:
    model, tokens = build_model("mistral"), prompt(20)
    program = build(model)
    cache = empty_cache(program)
    run(program, tokens, cache)
    cache.crop(11)
    other = prompt(6, seed=1)
    again = run(program, other, cache)
    assert torch.allclose(again, expected(model, torch.cat([tokens[:11], other]))[-1:], atol=1e-4)


def test_the_cache_grows_to_the_models_positions_and_no_further() -> None:
    program = build(build_model("llama", max_position_embeddings=600))
    cache = empty_cache(program)
    cache.reserve(3)
    assert cache.capacity == 256
    cache.store(1, 2, torch.ones(2, 1, 12), torch.ones(2, 1, 12))
    cache.length = 3
    cache.reserve(257)
    assert cache.capacity == 512 and bool((cache.keys[1, :, 2] == 1).all())
    assert cache.byte_count() == 2 * 2 * 2 * 512 * 12 * 4
    cache.reserve(513)
    assert cache.capacity == 600
    with pytest.raises(OptionError, match=r"601 tokens do not fit the model's 600 positions"):
        cache.reserve(601)
    with pytest.raises(OptionError, match=r"torch\.int8"):
        KeyValues(1, 1, 1, torch.int8, 1)


class OtherNorm(nn.Module):
    """Llama's norm but for a mean taken away."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _replace_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm = OtherNorm(model.model.layers[1].input_layernorm)


def _add_child(model: Any) -> None:
    model.model.layers[1].self_attn.extra = nn.Identity()


def _hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)


def _other_forward(model: Any) -> None:
    model.model.norm.forward = lambda x: x


def _other_linear(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.model.layers[1].mlp.up_proj = Doubled(48, 80)


def _other_shape(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = nn.Linear(48, 40)


def _other_attention(model: Any) -> None:
    model.config._attn_implementation = "my_sparse"


def _train(model: Any) -> None:
    model.train()


def _other_class(model: Any) -> None:
    model.__class__ = type("LlamaForCausalLM", (type(model),), {})


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (_replace_norm, "'model.layers.1.input_layernorm' is a OtherNorm"),
        (_add_child, r"'model.layers.1.self_attn.extra'"),
        (_hook, r"'model.layers.0.mlp' has a hook"),
        (_other_forward, r"'model.norm' has a hook or another forward"),
        (_other_linear, r"'model.layers.1.mlp.up_proj' is a Doubled"),
        (_other_shape, r"'model.layers.1.mlp.up_proj' is \[40, 48\]"),
        (_other_attention, "'my_sparse' is not exact attention"),
        (_train, "evaluation mode"),
        (_other_class, "class LlamaForCausalLM"),
    ],
)
def test_a_changed_model_is_refused(break_it: Any, says: str) -> None:
    model = build_model("llama")
    break_it(model)
    with pytest.raises(UnsupportedError, match=says):
        build(model)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"hidden_act": "quick_gelu"}, "activation QuickGELU"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type 'dynamic'"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "soft cap that a Gemma3ForCausalLM does not apply"),
        ("gemma3", {"use_bidirectional_attention": True}, "attends to later tokens"),
    ],
)
def test_a_configuration_beyond_the_runner_is_refused(family: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        build(build_model(family, **changes))


def test_a_soft_cap_that_the_models_attention_leaves_out_is_refused() -> None:
    model = build_model("gemma2")
    model.config._attn_implementation = "sdpa"  # which older Transformers let through
    with pytest.raises(UnsupportedError, match="load the model with 'eager'"):
        build(model)


@pytest.mark.parametrize("family", ["opt", "gpt2", "neox", "qwen3_moe"])
def test_other_families_are_refused_by_name(family: str) -> None:
    from tests.zoo import family_of

    with pytest.raises(UnsupportedError, match=family_of(family).model):
        build(family_of(family).build())


def test_a_partly_rotated_head_is_refused() -> None:
    model = build_model("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:3]
    with pytest.raises(UnsupportedError, match="rotates 6 of 12 channels"):
        build(model)


def test_building_after_the_model_has_run_changes_nothing() -> None:
    model = build_model("gemma3")
    with torch.inference_mode():
        model(input_ids=prompt(5)[None], output_hidden_states=True)
    check(model)
