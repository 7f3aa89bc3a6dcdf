"""Coded caches of a Llama-3-8B-shaped attention stack on one GPU: a step's attention, memory, and what encoding costs.

32 query heads over 8 KV heads of 128 channels; stores are filled by the recipes' own codecs with random keys and values
(their quality is measured elsewhere), calibrated ones with made-up tables. Rows of goal "KV stack": ``microseconds`` of
attention of one new token in one layer as part of a CUDA graph over ``layers`` different layers, against torch's
best over a bf16 cache of that length; ``tokens_per_second`` of 32 such layers; ``peak_bytes`` that a step allocates on
top of the cache. Goal "KV prefill": milliseconds to encode a chunk of 2,048 tokens of one layer, against its bf16
attention over half of the context and its linear layers. Goal "KV longest": the most tokens of a shape with 32 KV heads
(7B) whose codes fit, filled with synthetic blocks, and the attention of one step over all layers.
"""

from __future__ import annotations

import time
import traceback
from typing import Any

import torch
from gpu_kv_decode import BACKENDS, Captured, Job, microseconds, nbytes
from harness import Row, arguments, write
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rarefy.contracts import kv_recipes
from rarefy.kernels.triton.decode_attention import DecodeAttention
from rarefy.kv.attend import attend
from rarefy.kv.plan import HeadShape
from rarefy.kv.rotary import Rotary
from rarefy.kv.store import Arrival, LayerStore
from rarefy.recipes import discover

KEY = ("goal", "job", "tokens")
HEADS, QUERY_HEADS, CHANNELS, LAYERS, CHUNK = 8, 32, 128, 32, 2048
SCALING = CHANNELS**-0.5
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "kivi 4 bit, g128": ("kivi", {"num_bits": 4, "group_size": 128, "residual": 128}),
    "million 4 bit": ("million", {"width": 2, "code_bits": 8}),
    "gear 4 bit": ("gear", {"num_bits": 4}),
    "kv_quant 4 bit": ("kv_quant", {"num_bits": 4}),
    "turbo_quant 4 bit": ("turbo_quant", {"num_bits": 4}),
    "kivi 2 bit, g128": ("kivi", {"num_bits": 2, "group_size": 128, "residual": 128}),
    "kivi 4 bit, g32": ("kivi", {"num_bits": 4}),
    "kv_quant 3 bit": ("kv_quant", {"num_bits": 3}),
    "gear 2 bit": ("gear", {"num_bits": 2}),
}
ROTARY = Rotary(500000.0 ** -(torch.arange(CHANNELS // 2) / (CHANNELS // 2)))


def made_up(name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters of calibrated recipes, for normal numbers."""
    if name == "million":
        shape = CHANNELS // options["width"], 1 << options["code_bits"], options["width"]
        return {f"{side}.codebook": torch.randn(shape, device="cuda").half() for side in ("keys", "values")}
    if name != "kv_quant":
        return {}
    entries = 1 << options["num_bits"]
    lut = torch.special.ndtri((torch.arange(entries, device="cuda") + 0.5) / entries) / 3
    center, scale = torch.zeros(HEADS * CHANNELS, device="cuda"), 3 * torch.ones(HEADS * CHANNELS, device="cuda")
    return {"keys.center": center, "keys.scale": scale, "keys.lut": lut, "values.lut": lut}


def filled(label: str, tokens: int) -> tuple[LayerStore, float]:
    """A layer's store with so many tokens, and the milliseconds that its later chunks took to encode (median)."""
    name, options = RECIPES[label]
    recipe = kv_recipes.get(name)(**{"sink": 0, **options})
    codecs = recipe.codecs(HeadShape(HEADS, CHANNELS, CHANNELS, torch.bfloat16), made_up(name, options))
    store, took = LayerStore(codecs), []
    while store.length < tokens:
        key, value = (torch.randn(1, HEADS, CHUNK, CHANNELS, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        positions = torch.arange(store.length, store.length + CHUNK, device="cuda")[None]
        cos, sin = ROTARY.angles(positions)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        store.append(key, value, Arrival(None, positions, cos, sin, ROTARY))
        torch.cuda.synchronize()
        took.append((time.perf_counter() - begin) * 1e3)
    return store, sorted(took)[len(took) // 2]


def best_peer(tokens: int) -> tuple[str, float]:
    """Torch's best bf16 decode attention, microseconds."""
    query = torch.randn(1, QUERY_HEADS, 1, CHANNELS, device="cuda", dtype=torch.bfloat16)
    pair = [torch.randn(1, HEADS, tokens, CHANNELS, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    graphs = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            graphs[name] = Captured([lambda: scaled_dot_product_attention(query, *pair, enable_gqa=True)])
    times = microseconds(graphs, 15)
    peer = min(times, key=lambda name: times[name])
    return peer, times[peer]


def prefill_milliseconds(tokens: int) -> float:
    """bf16 attention of a chunk over half of ``tokens``, and the linear layers of one block, milliseconds."""
    query = torch.randn(1, QUERY_HEADS, CHUNK, CHANNELS, device="cuda", dtype=torch.bfloat16)
    pair = [torch.randn(1, HEADS, tokens // 2, CHANNELS, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    x = torch.randn(CHUNK, 4096, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(CHUNK, 14336, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16) for rows in (6144, 4096, 28672)]
    down = torch.randn(4096, 14336, device="cuda", dtype=torch.bfloat16)

    def layer() -> None:
        for weight in weights:
            x @ weight.T
        wide @ down.T
        with sdpa_kernel(list(BACKENDS.values())):
            scaled_dot_product_attention(query, *pair, enable_gqa=True)

    return microseconds({"": Captured([layer])}, 5)[""] / 1e3


def stack_rows(label: str, tokens: int, layers: int, peer: tuple[str, float], prefill: float) -> list[Row]:
    stores, encoding = zip(*(filled(label, tokens) for _ in range(layers)), strict=True)
    query = torch.randn(1, QUERY_HEADS, 1, CHANNELS, device="cuda", dtype=torch.bfloat16)
    found = attend(stores[0], query, scaling=SCALING, fused=True).float()
    expected = attend(stores[0], query, scaling=SCALING, fused=False).float()
    error = float((found - expected).norm() / expected.norm())
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend(stores[0], query, scaling=SCALING, fused=True)
    peak = torch.cuda.max_memory_allocated() - held
    captured = Captured([lambda store=store: attend(store, query, scaling=SCALING, fused=True) for store in stores])  # type: ignore[misc]
    took = microseconds({"": captured}, 15)[""]
    count = stores[0].nbytes()
    bits = count.total * 8 / stores[0].numbers()
    common = {"tokens": tokens, "bits_per_weight": round(bits, 3), "max_rel_error": error}
    return [
        {"goal": "KV stack", "job": label, **common, "peer": f"torch {peer[0]} bf16", "microseconds": round(took, 1),
         "peer_microseconds": round(peer[1], 1), "ratio": round(peer[1] / took, 3), "layers": layers,
         "tokens_per_second": round(1e6 / took / LAYERS, 1), "cache_bytes": count.total,
         "bf16_bytes": stores[0].numbers() * 2, "peak_bytes": peak,
         "note": f"random keys and values, 32 layers computed from {layers}; error is against the reference in code"},
        {"goal": "KV prefill", "job": label, **common, "peer": "bf16 attention and linear layers of the chunk",
         "milliseconds": round(sorted(encoding)[len(encoding) // 2], 3), "peer_milliseconds": round(prefill, 3),
         "ratio": round(prefill / sorted(encoding)[len(encoding) // 2], 3), "note": "encoding a chunk of 2048 tokens"},
    ]  # fmt: skip


def longest_row(num_bits: int, weights: float) -> Row:
    """As many tokens of a 7B shape as fit beside weights of so many bytes."""
    job = Job(f"uniform {num_bits} bit", "channel", "token", num_bits)
    heads, layers = 32, 32
    per_token = layers * 2 * heads * CHANNELS * (num_bits + 32 / 128) / 8
    free, _ = torch.cuda.mem_get_info()
    tokens = int((free - weights - 2e9) / per_token) // 16384 * 16384
    query = torch.randn(1, heads, CHANNELS, device="cuda")
    stacks, calls = [], []
    for _ in range(layers):
        tiles = tuple(_synthetic(kind, num_bits, heads, tokens) for kind in ("channel", "token"))
        stacks.append(tiles)
        calls.append(DecodeAttention(*tiles, 1, heads, heads, CHANNELS, tokens, device=query.device))
    took = microseconds({"": Captured([lambda call=call: call(query, SCALING) for call in calls])}, 3)[""] * layers  # type: ignore[misc]
    size = sum(nbytes(*tiles) for tiles in stacks)
    return {
        "goal": "KV longest", "job": job.name, "tokens": tokens, "milliseconds": round(took / 1e3, 2),
        "cache_bytes": size, "bits_per_weight": size * 8 / (tokens * layers * 2 * heads * CHANNELS),
        "note": f"7B shape, 32 layers of 32 KV heads; synthetic blocks; {weights / 1e9:.1f} GB left for weights; "
                f"attention alone, {size / took / 1e6:.2f} TB/s",
    }  # fmt: skip


def _synthetic(kind: str, num_bits: int, heads: int, tokens: int) -> Any:
    from rarefy.kernels.coded import Tiles

    codes = torch.randint(
        -(2**31), 2**31 - 1, (1, heads, tokens * CHANNELS * num_bits // 32), device="cuda", dtype=torch.int32
    )
    scale = torch.full((1, heads, tokens * CHANNELS // 128), 2.0**-num_bits, device="cuda", dtype=torch.float16)
    zero = torch.full_like(scale, 2.0 ** (num_bits - 1))
    return Tiles(kind, ((codes, scale, zero),), num_bits, 128 if kind == "channel" else 1, 128)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=4, help="different layers of a stack")
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing after so many")
    parser.add_argument("--only", default="", help="recipes whose names have this in them")
    parser.add_argument("--longest", type=int, nargs="*", default=[4, 2], help="bits of the longest contexts")
    options = parser.parse_args()
    begin = time.monotonic()
    discover()
    torch.manual_seed(0)
    tokens = options.tokens // 8 if options.quick else options.tokens
    peer, prefill = best_peer(tokens), prefill_milliseconds(tokens)
    print(f"{tokens} tokens: {peer}; a chunk's attention and linear layers {prefill:.2f} ms", flush=True)
    todo: list[Any] = [label for label in RECIPES if options.only in label]
    todo += [] if options.quick else options.longest
    for each in todo:
        if time.monotonic() - begin > options.seconds:
            print(f"No time for {each}.", flush=True)
            continue
        try:
            rows = (
                stack_rows(each, tokens, options.layers, peer, prefill)
                if isinstance(each, str)
                else [longest_row(each, 4e9)]
            )
        except Exception:  # one recipe must not lose the others
            print(f"{each}:\n{traceback.format_exc(limit=6)[-1500:]}", flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        for row in rows:
            print({name: value for name, value in row.items() if name != "note"}, flush=True)
        write(options, rows, KEY)


if __name__ == "__main__":
    main()
