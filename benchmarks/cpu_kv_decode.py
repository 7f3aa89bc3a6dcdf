"""Attention of one new token over a KV cache in code on the CPU, against the same over 16-bit numbers.

The shape of a 1B model: 32 query heads over 8 KV heads of 64 channels. Stores are filled by the recipes' codecs with
random keys and values, as many layers as exceed the processor's cache, and read in turn; ``ratio`` is the time over the
``identity`` cache in float16 by the same executor over ours, ``ratio_to_torch`` that of torch's attention over bfloat16
tensors, and ``gigabytes_per_second`` the bytes of the cache over our time. With one thread, times are those of the
processor, which other programs stretch less than the clock's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Row, arguments, write
from torch.nn.functional import scaled_dot_product_attention

from rarefy.contracts import kv_recipes
from rarefy.kernels.cpu import library
from rarefy.kv.attend import attend
from rarefy.kv.plan import HeadShape
from rarefy.kv.store import LayerStore
from rarefy.recipes import discover

KEY = ("job", "tokens", "threads")
HEADS, QUERY_HEADS, CHANNELS, MODEL_LAYERS, CHUNK = 8, 32, 64, 16, 2048
SCALING = CHANNELS**-0.5
BEYOND_CACHE = 150e6
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "identity float16": ("identity", {}),
    "kivi 4 bit, g32": ("kivi", {"num_bits": 4}),
    "kivi 4 bit, g64": ("kivi", {"num_bits": 4, "group_size": 64}),
    "kivi 3 bit, g64": ("kivi", {"num_bits": 3, "group_size": 64}),
    "kivi 2 bit, g64": ("kivi", {"num_bits": 2, "group_size": 64}),
    "kivi 8 bit, g64": ("kivi", {"num_bits": 8, "group_size": 64}),
    "turbo_quant 4 bit": ("turbo_quant", {"num_bits": 4}),
}


def filled(label: str, tokens: int) -> LayerStore:
    name, options = RECIPES[label]
    store = LayerStore(kv_recipes.get(name)(**options).codecs(HeadShape(HEADS, CHANNELS, CHANNELS, torch.float16), {}))
    while store.length < tokens:
        store.append(*(torch.randn(1, HEADS, CHUNK, CHANNELS).half() for _ in range(2)))
    return store


def microseconds(
    calls: dict[str, list[Callable[[], Any]]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median time of one call of each list, in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, each in calls.items():
            begin = clock()
            for call in each:
                call()
            if number:
                times[name].append((clock() - begin) * 1e6 / len(each))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    discover()
    torch.manual_seed(0)
    rows: list[Row] = []
    for tokens in [8192] if options.quick else [8192, 32768]:
        query = torch.randn(1, QUERY_HEADS, 1, CHANNELS).half()
        calls: dict[str, list[Callable[[], Any]]] = {}
        sizes: dict[str, LayerStore] = {}
        for label in RECIPES:
            first = sizes[label] = filled(label, tokens)
            count = min(8, 1 + int(BEYOND_CACHE) // first.nbytes().total)
            # Copies have memory of their own, which is what counts here.
            layers = [first]
            for _ in range(count - 1):
                twin = LayerStore(first.codecs)
                twin.restore_({name: tensor.clone() for name, tensor in first.tensors().items()})
                layers.append(twin)
            calls[label] = [partial(attend, store, query, scaling=SCALING) for store in layers]
        pairs = [[torch.randn(1, HEADS, tokens, CHANNELS).bfloat16() for _ in range(2)] for _ in range(4)]
        wide = query.bfloat16()
        calls["torch"] = [partial(scaled_dot_product_attention, wide, *pair, enable_gqa=True) for pair in pairs]
        for threads in options.threads:
            torch.set_num_threads(threads)
            times = microseconds(calls, options.rounds, time.process_time if threads == 1 else time.perf_counter)
            for label, store in sizes.items():
                count = store.nbytes().total
                rows.append({
                    "goal": "KV cpu", "job": f"decode attention, {label}", "tokens": tokens, "threads": threads,
                    "peer": "identity float16", "microseconds": round(times[label], 1),
                    "ratio": round(times["identity float16"] / times[label], 3),
                    "ratio_to_torch": round(times["torch"] / times[label], 3),
                    "milliseconds_of_16_layers": round(times[label] * MODEL_LAYERS / 1e3, 2),
                    "gigabytes_per_second": round(count / times[label] / 1e3, 2),
                    "bits_per_weight": round(count * 8 / store.numbers(), 3),
                    "note": f"{library.instructions() if library.available() else 'torch'}; random keys and values; "
                            "processor's time where there is one thread",
                })  # fmt: skip
                print({name: value for name, value in rows[-1].items() if name not in ("note", "goal")}, flush=True)
            print(f"torch bfloat16: {times['torch']:.0f} us", flush=True)
    write(options, rows, KEY)


if __name__ == "__main__":
    main()
