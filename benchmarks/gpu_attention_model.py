"""Tokens of a model over long caches, by a sparse plan and densely, without a graph: what ``generate`` takes.

Four layers of an 8B model's shape in Transformers, in bf16, launched by Python. Caches hold random keys and values, so
that no prompt has to be read; what a plan selects on them says nothing of its quality. The plan reads rarefy's cache,
which keeps what it knows of blocks; dense attention reads those of Transformers, of which ``DynamicCache`` copies
itself with every token and ``StaticCache`` has room for as many tokens as there will be. Contenders take turns.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from gpu_attention import CHANNELS, DEVICE, HEADS, KEY, KV_HEADS
from harness import Row, arguments, write
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import rarefy
from rarefy.integrations.transformers.plan_evaluation import dense_cache, set_plan

LAYERS = 4
PLANS = (
    "sparge:similarity=-1,density=0.1,dense_below=0,max_density=1",
    "infllm_v2:density=0.1,local=2,dense_below=0,max_density=1",
    "sparge:similarity=-1,density=0.1",  # dense where that was measured to be faster
)
STEPS = 8  # tokens between two looks at the clock


def llama(tokens: int) -> Any:
    config = LlamaConfig(
        hidden_size=HEADS * CHANNELS, intermediate_size=14336, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=CHANNELS, num_hidden_layers=LAYERS, vocab_size=1024, max_position_embeddings=tokens + 1024,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def filled(cache: Any, batch: int, tokens: int) -> Any:
    """``cache`` with random keys and values in every layer."""
    for layer in range(LAYERS):
        sides = (torch.randn(batch, KV_HEADS, tokens, CHANNELS, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        cache.update(*sides, layer, {"cache_position": torch.arange(tokens, device=DEVICE)})
    return cache


@torch.inference_mode()
def tokens_per_step(model: Any, cache: Any, batch: int) -> float:
    """Milliseconds of a token of every sequence, in the mean of a few."""
    token = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(STEPS):
        model(input_ids=token, past_key_values=cache, use_cache=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / STEPS * 1e3


def measure(batch: int, tokens: int, rounds: int) -> list[Row]:
    model = llama(tokens)
    contenders: dict[str, Callable[[], Any]] = {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        **{plan: lambda: dense_cache(model) for plan in PLANS},
        "StaticCache": lambda: StaticCache(config=model.config, max_cache_len=tokens + 1024),
    }
    times: dict[str, float] = {}
    density: dict[str, float] = {}
    ran: dict[str, str] = {}
    for name, make in contenders.items():
        try:
            setup = set_plan(model, name if name in PLANS else "dense")
            if setup is None:
                model.set_attn_implementation("sdpa")
            cache = filled(make(), batch, tokens)
            tokens_per_step(model, cache, batch)
            times[name] = statistics.median(tokens_per_step(model, cache, batch) for _ in range(rounds))
            if setup is not None:
                density[name] = setup.report.density()
                ran[name] = ", ".join([*setup.report.layers[0].executors, *setup.report.dense()])
                print(name, dict(setup.report.layers[0].executors), setup.report.dense(), flush=True)
            print(f"{batch} x {tokens}, {name}: {times[name]:.2f} ms a token", flush=True)
        except Exception as failure:
            print(f"{batch} x {tokens}, {name}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
            traceback.print_exc(limit=-3)
        cache = None
        torch.cuda.empty_cache()
    rarefy.set_attention(model, None)
    return [
        {
            "goal": "token", "job": f"a token, {plan}", "tokens": tokens, "density": 0.1, "batch": batch,
            "peer": f"sdpa, {peer}", "measured_density": round(density[plan], 4),
            "milliseconds": round(times[plan], 3), "peer_milliseconds": round(times[peer], 3),
            "ratio": round(times[peer] / times[plan], 3), "ran": ran[plan],
            "note": f"{LAYERS} layers of an 8B shape, eager",
        }
        for plan in PLANS if plan in times
        for peer in times if peer not in PLANS
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--cases", default="16x32768,1x131072,1x32768", help="batches and lengths")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    for case in options.cases.split(","):
        batch, length = (int(part) for part in case.split("x"))
        rows += measure(batch, length, options.rounds)
        write(options, rows, KEY)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
