"""What KV caches in code cost a model, at the bits that were measured, in the three regimes of ``rarefy eval --kv``.

Every cache keeps the first token of a sequence in 16 bits and none of the newest beyond the block that is not full, so
that what differs is the code. Calibrated ones see 16 windows of a calibration text that the evaluation text does not
overlap. A row per model, regime, context and cache: ``gap`` is its loss less that of the dense cache, in nats per
token, with the 95% interval of differences paired by windows. ``versus``: the same against the cache that was measured
first beside it, which says which of two is better more sharply than their distances from dense do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from harness import Row, arguments, write

import rarefy
from rarefy.evaluation.caches import CacheComparison

KEY = ("model", "regime", "context", "cache", "versus")
CACHES = [
    "fp8:sink=1",
    "kivi:num_bits=4,group_size=64,residual=64,sink=1",
    "turbo_quant:num_bits=4,sink=1",
    "kv_quant:num_bits=4",
    "gear:num_bits=4,group_size=64,block=64,sink=1",
    "gear:num_bits=3,group_size=64,block=64,sink=1",
    "million:width=2,code_bits=8,sink=1",
    "kivi:num_bits=3,group_size=64,residual=64,sink=1",
    "turbo_quant:num_bits=3,sink=1",
    "kv_quant:num_bits=3",
    "kv_quant:num_bits=3,importance=equal",
    "kv_quant:num_bits=3,rotated_keys=true",
    "gear:num_bits=2,group_size=64,block=64,sink=1",
    "million:width=2,code_bits=6,sink=1",
    "kivi:num_bits=2,group_size=64,residual=64,sink=1",
    "turbo_quant:num_bits=2,sink=1",
    "kv_quant:num_bits=2",
    "kv_quant:num_bits=2,q_norm=false",
]
CALIBRATED = ("kv_quant", "million")


def rows_of(result: CacheComparison) -> list[Row]:
    """A row for each cache of a comparison, and for each but the first one against that."""
    rows: list[Row] = []
    first = _name(result.caches[0].name)
    for cache in result.caches:
        assert cache.gap is not None
        name = _name(cache.name)
        about: Row = {
            "cache": name, "model": result.model, "regime": result.protocol.regime,
            "context": result.protocol.context, "protocol": result.protocol.describe(), "tokens": result.tokens,
        }  # fmt: skip
        if cache.versus_first is not None:
            versus = cache.versus_first
            rows.append({
                "goal": "KV paired", "job": f"{name} against {first}", **about, "versus": first, "gap": versus.value,
                "gap_low": versus.low, "gap_high": versus.high, "bits_per_weight": cache.bits["total"],
                "versus_bits": result.caches[0].bits["total"],
            })  # fmt: skip
        rows.append({
            "goal": "KV", "job": name, **about, "dense_nll": result.dense_nll, "gap": cache.gap.value,
            "gap_low": cache.gap.low, "gap_high": cache.gap.high, "kl": cache.kl,
            "top1_agreement": cache.top1_agreement, "bits_per_weight": cache.bits["total"], "bits": cache.bits,
            "shared_bytes": cache.shared_bytes,
            "note": " ".join(re.findall(r"(?:samples|seq_len)=\d+", cache.name)),
        })  # fmt: skip
    return rows


def _name(cache: str) -> str:
    """A cache without what it was calibrated on."""
    return re.sub(",(samples|seq_len|data)=[^,]*", "", cache)


def caches(chosen: Sequence[str], samples: int, seq_len: int, data: str) -> list[str]:
    """Caches, of which those that are calibrated are on so many windows of the text ``data``."""
    given = f"samples={samples},seq_len={seq_len},data={data}"
    return [f"{name},{given}" if name.startswith(CALIBRATED) else name for name in chosen]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="demo", help="folder, hub id or 'demo'")
    parser.add_argument("--data", default="demo", help="evaluation text, or 'demo'")
    parser.add_argument("--calibration", default="demo", help="calibration text, or 'demo'")
    parser.add_argument("--regimes", nargs="+", default=["chunked", "distorted", "decode"])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=0, help="0: the whole text")
    parser.add_argument("--decoded", type=int, default=2, help="windows that are decoded token by token")
    parser.add_argument("--batch-size", type=int, default=1, help="windows that go through at once")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only", help="caches whose names match this regular expression")
    parser.add_argument("--caches", nargs="+", default=CACHES, help="other caches, each held against the first")
    parser.add_argument("--samples", type=int, default=16, help="windows that calibrated caches see")
    options = parser.parse_args(argv)
    windows = 4 if options.quick else options.windows or None
    context = min(512, options.context) if options.quick else options.context
    everything = caches(options.caches, options.samples, min(2048, context), options.calibration)
    chosen = [name for name in everything if not options.only or re.search(options.only, name)]
    rows: list[Row] = []
    for regime in options.regimes:
        torch.manual_seed(0)
        result = rarefy.compare_caches(
            options.model, chosen, regime=regime, prefill=context * 7 // 8 if regime == "decode" else 0,
            context=context, windows=options.decoded if regime == "decode" else windows, data=options.data,
            dtype=options.dtype, batch_size=options.batch_size,
        )  # fmt: skip
        rows += rows_of(result)
        for row in rows_of(result):
            print(f"{regime} {row['job']}: {row['bits_per_weight']:.3f} bits, {row['gap']:+.4f} "
                  f"({row['gap_low']:+.4f} .. {row['gap_high']:+.4f}) nats", flush=True)  # fmt: skip
    write(options, rows, KEY)


if __name__ == "__main__":
    main()
