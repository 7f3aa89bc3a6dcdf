from __future__ import annotations

from typing import Any

import pytest
import torch

from rarefy.core.errors import UnsupportedError
from rarefy.sources.jitter import jitter
from tests.sources.tiny_gguf import tiny_model

SIZES = {"layers": 2, "heads": 4, "kv_heads": 2}
TOKENS = torch.arange(60).reshape(2, 30) * 4


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {"head_dim": 32})],
)
def test_logits_stay_and_weights_move(model_type: str, options: dict[str, Any]) -> None:
    model = tiny_model(model_type, **options)
    before = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shaken = jitter(state, **SIZES, sigma=0.10, seed=0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=f"the input's {name} was changed")
        if "_proj.weight" in name:
            moved = ((shaken[name] / tensor).log().std()).item()
            assert 0.05 < moved < 0.2, name
    model.load_state_dict(shaken)
    assert (logits(model) - before).abs().max() < 1e-4
    assert before.std() > 0.5, "logits near zero would prove nothing"


def test_factors_depend_on_the_seed_alone() -> None:
    state = tiny_model("llama").state_dict()
    once, again = (jitter(state, **SIZES, sigma=0.10, seed=3) for _ in range(2))
    other = jitter(state, **SIZES, sigma=0.10, seed=4)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(once[name], again[name])
    assert not torch.equal(once[name], other[name])
    gains = torch.ones(64)
    drawn = jitter(state | {"model.layers.0.input_layernorm.weight": gains}, **SIZES, sigma=0.10, seed=0)
    # exp(0.1 * 1.764052), exp(0.1 * 0.400157), exp(0.1 * 0.978738): cached folders of older releases rely on these.
    expected = torch.tensor([1.1929214, 1.0408272, 1.1028197])
    torch.testing.assert_close(drawn["model.layers.0.input_layernorm.weight"][:3], expected, rtol=1e-5, atol=0)


def test_sigma_zero_changes_nothing() -> None:
    state = tiny_model("llama").state_dict()
    still = jitter(state, **SIZES, sigma=0.0, seed=0)
    assert all(torch.equal(still[name], tensor) for name, tensor in state.items())


def test_dtype_is_kept() -> None:
    state = {name: tensor.bfloat16() for name, tensor in tiny_model("llama").state_dict().items()}
    assert {tensor.dtype for tensor in jitter(state, **SIZES, sigma=0.1, seed=0).values()} == {torch.bfloat16}


def test_a_missing_tensor_is_named() -> None:
    state = tiny_model("llama").state_dict()
    del state["model.layers.1.mlp.gate_proj.weight"]
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight"):
        jitter(state, **SIZES, sigma=0.1, seed=0)
