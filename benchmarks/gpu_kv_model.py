"""A whole step of a Llama-3-8B-shaped model over a long cache in code, on one GPU, against a bf16 cache.

Transformers' own model with random bf16 weights, through the coded cache and the attention function as anyone would run
them, but that one step (storing a token, attending to all, all linear layers, the logits) is captured in a CUDA graph,
so that what is measured is the GPU. Caches are filled by the recipes' own encoders with random keys and values. The
peer is the same model and graph over a bf16 cache into which a token is written in place, with the best of torch's
attention kernels. Rows of goal "KV model": ``microseconds`` of a step, ``tokens_per_second``, ``cache_bytes``,
``total_bytes`` (the most that is allocated during a step, weights and cache included) and ``step_bytes`` (how much of
it is the step's own: a dense copy of one layer's past would be ``layer_bytes``). ``max_rel_error`` is that of the
logits against the same step by the reference.
"""

from __future__ import annotations

import time
import traceback
from functools import partial
from typing import Any

import torch
from gpu_kv_decode import BACKENDS, Captured, microseconds
from gpu_kv_stack import RECIPES, chunk, made_up
from harness import Row, arguments, write
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, Cache, LlamaConfig
from transformers.cache_utils import DynamicLayer

from rarefy.contracts import kv_recipes
from rarefy.integrations.transformers.kv_cache import CodedCache
from rarefy.integrations.transformers.kv_setup import KvSetup
from rarefy.kv.attend import attend
from rarefy.kv.store import LayerStore
from rarefy.kv.view import Handle
from rarefy.recipes import discover

KEY = ("goal", "job", "tokens")
SHAPE: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 500000.0, "max_position_embeddings": 1 << 20,
}  # fmt: skip
ORDER = [
    "kivi 4 bit, g128", "turbo_quant 4 bit", "kv_quant 4 bit", "kv_quant 3 bit", "kivi 2 bit, g128", "million 4 bit",
]  # fmt: skip


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, fused: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as Transformers calls it, over a coded cache or a dense one. One token needs no mask, but Transformers
    makes one for its own implementations while a graph is captured, which no kernel of torch takes."""
    if isinstance(key, Handle):
        return attend(key.store, query, scaling=scaling, fused=fused).transpose(1, 2), None
    return scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2), None


class InPlace(DynamicLayer):
    """A bf16 cache with room for one more token, which every step writes."""

    def __init__(self, tokens: int):
        super().__init__()
        key, value = chunk(0, tokens + 1)[:2]
        self.keys, self.values, self.tokens, self.is_initialized = key, value, tokens, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, self.tokens :] = key_states
        self.values[:, :, self.tokens :] = value_states
        return self.keys, self.values

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.tokens


def coded_cache(model: Any, label: str, tokens: int) -> CodedCache:
    """A cache of so many random tokens. Layers after the first have copies of its blocks."""
    name, options = RECIPES[label]
    made = {part: tensor.cpu() for part, tensor in made_up(name, options).items()}
    params = {layer: made for layer in range(model.config.num_hidden_layers)} if made else None
    cache = KvSetup(name, kv_recipes.get(name)(**{"sink": 0, **options}), params)(model)
    model.set_attn_implementation("one token")
    first, *others = cache.coded_layers
    while first.get_seq_length() < tokens:
        key, value, arrival = chunk(first.get_seq_length())
        first.announce(arrival)
        first.update(key, value)
    held = first.store.tensors()
    for layer in others:
        layer.lazy_initialization(key, value)
        layer.store.restore_({name: tensor.clone() for name, tensor in held.items()})
    return cache


class Step:
    """A token's step that leaves the cache as it was."""

    def __init__(self, model: Any, cache: Cache):
        self.model, self.cache, self.token = model, cache, torch.full((1, 1), 7, device="cuda")
        coded = cache.coded_layers if isinstance(cache, CodedCache) else []
        stores: list[LayerStore] = [layer.store for layer in coded]
        self.tails = [(side, side.tail) for store in stores for side in (store.keys, store.values) if side is not None]

    def __call__(self) -> Tensor:
        logits: Tensor = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
        for side, tail in self.tails:
            side.tail = tail
        return logits


def measured(step: Step) -> tuple[Captured, Tensor, int, int]:
    """The captured step, its logits, the most bytes that are allocated during it, and how many of them are its own."""
    step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logits = step().float()
    most = torch.cuda.max_memory_allocated()
    return Captured([step]), logits, most, most - held


def peer_row(model: Any, tokens: int) -> Row:
    """The step over a bf16 cache with the best kernel."""
    cache = Cache(layers=[InPlace(tokens) for _ in range(model.config.num_hidden_layers)])
    graphs, bytes_ = {}, {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            captured, _, most, own = measured(Step(model, cache))
            graphs[name], bytes_[name] = captured, (most, own)
    times = microseconds(graphs, 7)
    best = min(times, key=lambda name: times[name])
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {
        "goal": "KV model", "job": "bf16", "tokens": tokens, "bits_per_weight": 16.0, "peer": f"torch {best}",
        "microseconds": round(times[best], 1), "tokens_per_second": round(1e6 / times[best], 1), "ratio": 1.0,
        "cache_bytes": size, "total_bytes": bytes_[best][0], "step_bytes": bytes_[best][1],
        "layer_bytes": size // len(cache.layers), "note": "written in place",
    }  # fmt: skip


def coded_row(model: Any, label: str, tokens: int, peer: Row) -> Row:
    cache = coded_cache(model, label, tokens)
    step = Step(model, cache)
    captured, logits, most, own = measured(step)
    took = microseconds({"": captured}, 7)[""]
    model.set_attn_implementation("reference")
    expected = step().float()
    return {
        "goal": "KV model", "job": label, "tokens": tokens, "bits_per_weight": round(cache.bits()["total"], 3),
        "peer": f"the model over bf16, {peer['peer']}", "microseconds": round(took, 1),
        "peer_microseconds": peer["microseconds"], "tokens_per_second": round(1e6 / took, 1),
        "ratio": round(peer["microseconds"] / took, 3), "cache_bytes": cache.nbytes().total, "total_bytes": most,
        "step_bytes": own, "layer_bytes": peer["layer_bytes"],
        "max_rel_error": float((logits - expected).norm() / expected.norm()),
        "note": "random weights, keys and values; error of logits is against the reference over the same cache",
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, nargs="*", default=[131072])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing after so many")
    parser.add_argument("--only", nargs="*", default=ORDER, help="recipes")
    options = parser.parse_args()
    begin = time.monotonic()
    discover()
    torch.manual_seed(0)
    lengths, layers = ([16384], 4) if options.quick else (options.tokens, options.layers)
    config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
    with torch.device("cuda"), torch.inference_mode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    AttentionInterface.register("one token", attention)
    AttentionInterface.register("reference", partial(attention, fused=False))
    model.set_attn_implementation("one token")
    print(f"{layers} layers, {time.monotonic() - begin:.0f} s", flush=True)
    with torch.inference_mode():
        for tokens in lengths:
            peer = peer_row(model, tokens)
            write(options, [peer], KEY)
            print(peer, flush=True)
            for label in options.only:
                torch.cuda.empty_cache()
                if time.monotonic() - begin > options.seconds:
                    print(f"No time for {label}.", flush=True)
                    continue
                try:
                    row = coded_row(model, label, tokens, peer)
                except Exception:  # one recipe must not lose the others
                    print(f"{label}:\n{traceback.format_exc(limit=8)[-2000:]}", flush=True)
                    continue
                write(options, [row], KEY)
                print({name: value for name, value in row.items() if name != "note"}, flush=True)


if __name__ == "__main__":
    main()
