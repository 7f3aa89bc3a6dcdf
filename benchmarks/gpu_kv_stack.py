"""Coded caches of a Llama-3-8B-shaped attention stack on one GPU: a step's attention, memory, and what encoding costs.

32 query heads over 8 KV heads of 128 channels; stores are filled by the recipes' own codecs with random keys and values
(their quality is measured elsewhere), calibrated ones with made-up tables. Rows of goal "KV stack": ``microseconds`` of
storing one new token and of its attention in one layer, as part of a CUDA graph over ``layers`` different layers,
against writing it into a bf16 cache of that length and torch's best attention; ``tokens_per_second`` of 32 such layers;
``peak_bytes`` that a step allocates on top of the cache. Goal "KV prefill": for how many milliseconds of a chunk of
2,048 tokens the GPU is busy in one layer with putting it into code, between the chunk's other work, against its bf16
attention over half of the context and its linear layers; ``host_milliseconds`` that the host is busy with that. Goal
"KV encode": one launch that puts 2,048 tokens of keys or values of 8 heads into code, against the codec in torch's
operations, whose bits it gives (``max_rel_error`` is the share of stored numbers that differ). Goal
"KV longest": the most tokens of a shape with 32 KV heads (7B) whose codes fit, filled with synthetic blocks, and the
attention of one step over all layers.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from gpu_kv_decode import BACKENDS, COMPILERS, Captured, microseconds, nbytes
from harness import Row, arguments, write
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rarefy.contracts import kv_recipes
from rarefy.formats.grids import IntegerGrid
from rarefy.kernels.coded import Tiles
from rarefy.kernels.cuda import driver
from rarefy.kernels.cuda.attend import CodedAttention
from rarefy.kv.attend import attend
from rarefy.kv.codec import Codec
from rarefy.kv.codec import nbytes as nbytes_of
from rarefy.kv.codecs import (
    ChannelTable,
    Gridded,
    JoinedHeads,
    NormTable,
    Permuted,
    ProductTable,
    RangeTable,
    Residual,
    Rotated,
    Sparse,
    Trimmed,
)
from rarefy.kv.codecs.plain import Axis
from rarefy.kv.encoding import fast_form, fast_payload
from rarefy.kv.plan import HeadShape
from rarefy.kv.rotary import Rotary
from rarefy.kv.store import Arrival, LayerStore
from rarefy.recipes import discover
from rarefy.recipes.kv.turbo_quant import gaussian_table

KEY = ("goal", "job", "tokens")
HEADS, QUERY_HEADS, CHANNELS, LAYERS, CHUNK = 8, 32, 128, 32, 2048
ROUNDS = 5
UNIFORM: tuple[tuple[Axis, int, int], ...] = (
    ("channel", 4, 128), ("channel", 4, 32), ("channel", 3, 128), ("token", 4, 128), ("token", 2, 32),
)  # fmt: skip
ENCODE_NOTE = "2,048 tokens of keys or values of 8 heads of 128 channels"
SPARE = 6e8  # bytes that whatever else runs takes
SCALING = CHANNELS**-0.5
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "kivi 4 bit, g128": ("kivi", {"num_bits": 4, "group_size": 128, "residual": 128}),
    "kv_quant 4 bit": ("kv_quant", {"num_bits": 4}),
    "million 4 bit": ("million", {"width": 2, "code_bits": 8}),
    "gear 4 bit": ("gear", {"num_bits": 4}),
    "kivi 4 bit, g32": ("kivi", {"num_bits": 4}),
    "turbo_quant 4 bit": ("turbo_quant", {"num_bits": 4}),
    "kv_quant 3 bit": ("kv_quant", {"num_bits": 3}),
    "kivi 2 bit, g128": ("kivi", {"num_bits": 2, "group_size": 128, "residual": 128}),
    "gear 2 bit": ("gear", {"num_bits": 2}),
    "kivi 3 bit, g128": ("kivi", {"num_bits": 3, "group_size": 128, "residual": 128}),
    "turbo_quant 3 bit": ("turbo_quant", {"num_bits": 3}),
    "fp8": ("fp8", {}),
}
ROTARY = Rotary(500000.0 ** -(torch.arange(CHANNELS // 2) / (CHANNELS // 2)))


def made_up(name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters of calibrated recipes, for normal numbers."""
    if name == "million":
        shape = HEADS, CHANNELS // options["width"], 1 << options["code_bits"], options["width"]
        order = torch.rand(HEADS, CHANNELS, device="cuda").argsort(-1).to(torch.int16)
        books = {f"{side}.codebook": torch.randn(shape, device="cuda").half() for side in ("keys", "values")}
        weights = {f"{side}.weight": torch.ones(HEADS, CHANNELS, device="cuda") for side in ("keys", "values")}
        return {**books, **weights, "keys.order": order.cpu()}
    if name != "kv_quant":
        return {}
    entries = 1 << options["num_bits"]
    lut = torch.special.ndtri((torch.arange(entries, device="cuda") + 0.5) / entries) / 3
    center, scale = torch.zeros(HEADS * CHANNELS, device="cuda"), 3 * torch.ones(HEADS * CHANNELS, device="cuda")
    tables = {"keys.lut": lut, "values.lut": lut / lut.max()}
    return {"keys.center": center, "keys.scale": scale, "keys.counts": torch.ones_like(scale), **tables}


def chunk(start: int, count: int = CHUNK) -> tuple[Tensor, Tensor, Arrival]:
    """Keys, values and positions of tokens from ``start`` on."""
    key, value = (torch.randn(1, HEADS, count, CHANNELS, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    positions = torch.arange(start, start + count, device="cuda")[None]
    return key, value, Arrival(None, positions, *ROTARY.angles(positions), ROTARY)


def filled(label: str, tokens: int) -> LayerStore:
    """A layer's store with so many tokens."""
    name, options = RECIPES[label]
    recipe = kv_recipes.get(name)(**{"sink": 0, **options})
    store = LayerStore(recipe.codecs(HeadShape(HEADS, CHANNELS, CHANNELS, torch.bfloat16), made_up(name, options)))
    while store.length < tokens:
        store.append(*chunk(store.length))
    return store


def best_peer(tokens: int) -> tuple[str, float]:
    """Torch's best bf16 decode attention after a token is written in place, microseconds."""
    query = torch.randn(1, QUERY_HEADS, 1, CHANNELS, device="cuda", dtype=torch.bfloat16)
    pair = [torch.randn(1, HEADS, tokens, CHANNELS, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    token = torch.randn(1, HEADS, 1, CHANNELS, device="cuda", dtype=torch.bfloat16)

    def stored() -> Tensor:
        for each in pair:
            each[:, :, -1:] = token
        return scaled_dot_product_attention(query, *pair, enable_gqa=True)

    graphs = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            graphs[name] = Captured([stored])
    times = microseconds(graphs, 15)
    peer = min(times, key=lambda name: times[name])
    return peer, times[peer]


def prefill_layer(tokens: int) -> Callable[[], None]:
    """bf16 attention of a chunk over half of ``tokens``, and the linear layers of one block."""
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

    return layer


def prefill(layer: Callable[[], None], stores: list[LayerStore]) -> tuple[float, float, float]:
    """Milliseconds of a layer's work on a chunk, of putting the chunk into code after it, and that the host is busy
    with the latter; medians. The host is ahead, so that the GPU does not wait for it."""

    def event() -> torch.cuda.Event:
        found = torch.cuda.Event(enable_timing=True)
        found.record()
        return found

    took: list[list[float]] = [[], [], []]
    for number in range(ROUNDS + 1):
        chunks = [chunk(store.length) for store in stores]
        torch.cuda.synchronize()
        layer()  # while the host gets ahead
        marks, host = [], []
        for store, arriving in zip(stores, chunks, strict=True):
            marks.append([event()])
            layer()
            marks[-1].append(event())
            busy = time.perf_counter()
            store.append(*arriving)
            host.append((time.perf_counter() - busy) * 1e3)
            marks[-1].append(event())
        torch.cuda.synchronize()
        if number:
            took[0] += [begin.elapsed_time(middle) for begin, middle, _ in marks]
            took[1] += [middle.elapsed_time(end) for _, middle, end in marks]
            took[2] += host
    return statistics.median(took[0]), statistics.median(took[1]), statistics.median(took[2])


def step(store: LayerStore, query: Tensor, arriving: tuple[Tensor, Tensor, Arrival]) -> Tensor:
    """Store one token in a copy, and attend to all."""
    return attend(store.copy().append(*arriving), query, scaling=SCALING)


def stack_rows(label: str, tokens: int, layers: int, peer: tuple[str, float], layer: Callable[[], None]) -> list[Row]:
    stores = [filled(label, tokens) for _ in range(layers)]
    query = torch.randn(1, QUERY_HEADS, 1, CHANNELS, device="cuda", dtype=torch.bfloat16)
    found = attend(stores[0], query, scaling=SCALING).float()
    expected = attend(stores[0], query, scaling=SCALING, fused=False).float()
    error = float((found - expected).norm() / expected.norm())
    arriving = chunk(tokens, 1)
    step(stores[0], query, arriving)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(stores[0], query, arriving)
    peak = torch.cuda.max_memory_allocated() - held
    captured = Captured([lambda store=store: step(store, query, arriving) for store in stores])  # type: ignore[misc]
    took = microseconds({"": captured}, 15)[""]
    count = stores[0].nbytes()
    bits = count.total * 8 / stores[0].numbers()
    common = {"tokens": tokens, "bits_per_weight": round(bits, 3), "max_rel_error": error}
    stack: Row = {
        "goal": "KV stack", "job": label, **common, "peer": f"torch {peer[0]} bf16", "microseconds": round(took, 1),
        "peer_microseconds": round(peer[1], 1), "ratio": round(peer[1] / took, 3), "layers": layers,
        "tokens_per_second": round(1e6 / took / LAYERS, 1), "cache_bytes": count.total,
        "bf16_bytes": stores[0].numbers() * 2, "peak_bytes": peak,
        "note": f"random keys and values, 32 layers computed from {layers}; error is against the reference in code",
    }  # fmt: skip
    del captured
    alone, coding, host = prefill(layer, stores)
    return [
        stack,
        {"goal": "KV prefill", "job": label, **common, "peer": "bf16 attention and linear layers of the chunk",
         "milliseconds": round(coding, 4), "peer_milliseconds": round(alone, 3),
         "host_milliseconds": round(host, 3), "ratio": round(alone / coding, 3),
         "note": "what encoding a chunk of 2048 tokens adds"},
    ]  # fmt: skip


def encode_codecs() -> dict[str, Codec]:
    """What the launches of "KV encode" do."""

    def uniform(axis: Axis, num_bits: int, group: int) -> Codec:
        grid = IntegerGrid(num_bits=num_bits, group_size=group, zero="float")
        return Gridded(grid, axis, 128 if axis == "channel" else 32, CHANNELS)

    found = {f"uniform {bits} bit by {axis}, g{group}": uniform(axis, bits, group) for axis, bits, group in UNIFORM}
    for bits in (4, 3):
        found[f"rotated table {bits} bit"] = Rotated(NormTable(gaussian_table(bits), 32, CHANNELS), CHANNELS)
    found["table 3 bit within a range"] = RangeTable(gaussian_table(3), 32, CHANNELS)
    books = ProductTable(torch.randn(HEADS, CHANNELS // 2, 256, 2).half(), 32, torch.rand(HEADS, CHANNELS))
    order = torch.rand(HEADS, CHANNELS).argsort(-1).to(torch.int16)
    found["product codes of 2 channels"] = Permuted(books, order)
    width, lut = HEADS * CHANNELS, gaussian_table(3)
    outliers = Sparse(10, "token", 32, width)
    keys = ChannelTable(lut, torch.randn(1, width), torch.rand(1, width), 32)
    values = Trimmed(RangeTable(lut, 32, width), 5, "token")
    for axis, num_bits in (("channel", 2), ("token", 4)):
        gear = kv_recipes.get("gear")(num_bits=num_bits)
        both = gear.codecs(HeadShape(HEADS, CHANNELS, CHANNELS, torch.bfloat16), {})
        job = f"uniform {num_bits} bit by {axis}, errors, rank 2"
        found[job] = both.keys if axis == "channel" else both.values
    found["rows around centers, 10 outliers"] = JoinedHeads(Residual(keys, outliers), HEADS)
    found["rows within a range, 10 outliers"] = JoinedHeads(Residual(values, outliers), HEADS)
    return found


def encode_row(job: str) -> Row:
    """One launch against the codec itself, on numbers among which there are constants and extremes."""
    codec = encode_codecs()[job]
    x = (torch.randn(1, HEADS, CHUNK, CHANNELS, device="cuda") * torch.rand(CHANNELS, device="cuda").exp()).bfloat16()
    x[0, 0, :64], x[0, 1, :, 3], x[0, 1, 5] = 0.25, 0.0, 0.0
    x[0, 2, :, 7] = 1000 + torch.randn(CHUNK, device="cuda")
    fast = fast_form(codec, x)
    assert fast is not None
    faults, blocks = torch.zeros(1, dtype=torch.int32, device="cuda"), x.float().unflatten(2, (-1, codec.tokens))
    found, expected = fast_payload(codec, fast, x, None, faults), codec.encode(blocks)
    differ = sum(int((found[name] != expected[name]).sum()) for name in expected)
    took = microseconds({"": Captured([lambda: fast_payload(codec, fast, x, None, faults)] * 4)}, 9)[""]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(3):
        codec.encode(blocks)
    torch.cuda.synchronize()
    peer = (time.perf_counter() - begin) / 3 * 1e6
    return {
        "goal": "KV encode", "job": job, "tokens": CHUNK, "peer": "the codec in torch", "microseconds": round(took, 2),
        "peer_microseconds": round(peer, 1), "ratio": round(peer / took, 1),
        "max_rel_error": differ / sum(part.numel() for part in expected.values()),
        "bits_per_weight": nbytes_of(expected).total * 8 / x.numel(), "note": ENCODE_NOTE,
    }  # fmt: skip


def longest_row(num_bits: int) -> Row:
    """As many tokens of a 7B shape as fit beside its weights in 4 bits."""
    heads, layers, weights = 32, 32, 3.6e9
    per_token = layers * 2 * heads * CHANNELS * (num_bits + 32 / 128) / 8
    free, _ = torch.cuda.mem_get_info()
    tokens = int((free - weights - SPARE) / per_token) // 16384 * 16384
    query = torch.randn(1, heads, CHANNELS, device="cuda")
    stacks, calls = [], []
    for _ in range(layers):
        tiles = tuple(_synthetic(kind, num_bits, heads, tokens) for kind in ("channel", "token"))
        stacks.append(tiles)
        calls.append(CodedAttention(*tiles, ([tokens], [tokens]), 1, heads, heads, device=query.device))
    took = microseconds({"": Captured([lambda call=call: call(query, SCALING) for call in calls])}, 3)[""] * layers  # type: ignore[misc]
    size = sum(nbytes(*tiles) for tiles in stacks)
    return {
        "goal": "KV longest", "job": f"uniform {num_bits} bit", "tokens": tokens, "milliseconds": round(took / 1e3, 2),
        "cache_bytes": size, "bits_per_weight": size * 8 / (tokens * layers * 2 * heads * CHANNELS),
        "note": f"7B shape, 32 layers of 32 KV heads; synthetic blocks; {weights / 1e9:.1f} GB left for weights; "
                "attention alone",
    }  # fmt: skip


def _synthetic(kind: str, num_bits: int, heads: int, tokens: int) -> Tiles:
    words = (1, heads, tokens * CHANNELS * num_bits // 32)
    codes = torch.randint(-(2**31), 2**31 - 1, words, device="cuda", dtype=torch.int32)
    scale = torch.full((1, heads, tokens * CHANNELS // 128), 2.0**-num_bits, device="cuda", dtype=torch.float16)
    zero = torch.full_like(scale, 2.0 ** (num_bits - 1))
    return Tiles(kind, ((codes, scale, zero),), num_bits, 128 if kind == "channel" else 1, 128)


def warmed(each: tuple[str, int] | int) -> dict[Any, bytes]:
    """Machine code of what a row needs: that of a recipe and so many tokens, or of the longest context of codes."""
    try:
        discover()
        if isinstance(each, tuple):
            store = filled(*each)
            query = torch.randn(1, QUERY_HEADS, 1, CHANNELS, device="cuda", dtype=torch.bfloat16)
            step(store, query, chunk(store.length, 1))
        else:
            tiles = tuple(_synthetic(kind, each, 1, 128) for kind in ("channel", "token"))
            query = torch.randn(1, 1, CHANNELS, device="cuda")
            CodedAttention(*tiles, ([128], [128]), 1, 1, 1, device=query.device)(query, SCALING)
    except Exception:  # the row will say why
        traceback.print_exc(limit=3)
    return driver.images


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, nargs="*", default=[131072, 32768])
    parser.add_argument("--layers", type=int, default=4, help="different layers of a stack")
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing after so many")
    parser.add_argument("--only", nargs="*", default=[""], help="recipes whose names have one of these in them")
    parser.add_argument("--longest", type=int, nargs="*", default=[4, 3, 2], help="bits of the longest contexts")
    options = parser.parse_args()
    begin = time.monotonic()
    discover()
    torch.manual_seed(0)
    lengths = [tokens // 8 for tokens in options.tokens] if options.quick else options.tokens
    labels = [label for label in RECIPES if any(part in label for part in options.only)]
    longest = [] if options.quick else options.longest
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for images in pool.map(warmed, [*((label, tokens) for tokens in lengths for label in labels), *longest]):
            driver.images.update(images)
    print(f"{len(driver.images)} kernels compiled, {time.monotonic() - begin:.0f} s", flush=True)
    work: list[tuple[str, Callable[[], list[Row]]]] = []
    for job in encode_codecs():
        work.append((f"encode {job}", partial(lambda job: [encode_row(job)], job)))
    last = [(f"longest {num_bits} bit", partial(lambda bits: [longest_row(bits)], num_bits)) for num_bits in longest]
    for tokens in lengths:
        about: list[Any] = []  # what all recipes are held against, measured with the first of them

        def rows(label: str, tokens: int = tokens, about: list[Any] = about) -> list[Row]:
            if not about:
                about.extend([best_peer(tokens), prefill_layer(tokens)])
            return stack_rows(label, tokens, options.layers, *about)

        work += [(f"{label}, {tokens} tokens", partial(rows, label)) for label in labels]
        work += last if tokens == lengths[0] else []
    for name, measured in work:
        if time.monotonic() - begin > options.seconds:
            print(f"No time for {name}.", flush=True)
            continue
        try:
            found = measured()
        except Exception:  # one recipe must not lose the others
            print(f"{name}:\n{traceback.format_exc(limit=6)[-1500:]}", flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        for row in found:
            print({name: value for name, value in row.items() if name != "note"}, flush=True)
        write(options, found, KEY)


if __name__ == "__main__":
    main()
