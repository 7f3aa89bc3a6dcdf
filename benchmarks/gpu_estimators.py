"""Trained and windowed and low-bit estimators on one GPU: right or wrong, how much of dense attention's time they take,
and whole plans with them against the best dense kernels.

32 query heads over 8 KV heads of 128 channels in bf16, causal, one sequence of random numbers (see
``gpu_attention.py``). Gates have random weights, which takes as long as trained ones; SALE's threshold is the one that
keeps as many blocks as asked for. ``share`` is the estimator's part of the time of the fastest dense kernel; ``ratio``
the peer's time over ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from gpu_attention import CHANNELS, DEVICE, HEADS, KV_HEADS, SCALING, Clock, dense, tensors
from harness import Row, arguments, write
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.estimators import Estimator
from rarefy.attention.estimators.gated import Gated
from rarefy.attention.estimators.low_bit import LowBitProducts
from rarefy.attention.estimators.windowed import WindowMeans
from rarefy.attention.executors import choose
from rarefy.attention.gate import BlockGate
from rarefy.attention.plan import AttentionPlan
from rarefy.attention.policy import Policy
from rarefy.attention.reach import Reach
from rarefy.attention.selectors import Selector, Threshold, TopK
from rarefy.attention.source import Plain
from rarefy.kv.rotary import Rotary

KEY = ("job", "tokens", "peer")
POOLS = ("max", "min", "mean")


def rotary(device: str) -> Rotary:
    channels = torch.arange(0, CHANNELS, 2, device=device)
    return Rotary(5e5 ** (-channels.float() / CHANNELS))


def call_of(query: Tensor, key: Tensor, value: Tensor) -> Call:
    turn, tokens = rotary(str(query.device)), query.shape[2]
    places = torch.arange(tokens, device=query.device)[None]
    cos, sin = (part.to(query.dtype) for part in turn.angles(places))
    reach = Reach.last(tokens, key.shape[2])
    return Call(query, Plain(key, value), reach, SCALING, angles=(cos, sin), positions=places, find_rotary=lambda: turn)


def gates(maps: int) -> Gated:
    found = BlockGate.new(HEADS, maps, CHANNELS, POOLS, False)
    to = [None if part is None else part.to(DEVICE, torch.bfloat16) for part in (found.keys, found.queries)]
    assert to[0] is not None
    return Gated({"prefill": replace(found, keys=to[0], queries=to[1])})


def check() -> None:
    """Kernels against the same estimators in torch."""
    jobs: list[tuple[str, Any, int, int, int]] = [
        ("gate", lambda: gates(HEADS), HEADS, 64, 64),
        ("gate by group", lambda: gates(KV_HEADS), KV_HEADS, 64, 64),
        ("windows", lambda: WindowMeans(32, 16), KV_HEADS, 64, 64),
        ("windows, coarse", lambda: WindowMeans(32, 16, (128, 64)), KV_HEADS, 64, 64),
        ("windows, coarse, every 4", lambda: WindowMeans(32, 16, (128, 64), every=4), KV_HEADS, 128, 64),
        ("low bit 64x32", LowBitProducts, HEADS, 64, 32),
        ("low bit 64x64, every 4", lambda: LowBitProducts(sink=64, every=4), HEADS, 64, 64),
        ("8 bits 128x128", lambda: LowBitProducts(num_bits=8, smooth=False, sink=128), HEADS, 128, 128),
    ]
    for tokens in (1000,):
        query, key, value = tensors(tokens)
        call, exact = call_of(query, key, value), call_of(*(part.float().cpu() for part in (query, key, value)))
        for name, make, maps, block_q, block_k in jobs:
            try:
                estimator = make()
                ours = estimator.scores(replace(call, mask_heads=maps), call.reach.blocks(block_q, block_k)).cpu()
                if isinstance(estimator, Gated):
                    estimator = on_host(estimator)
                theirs = estimator.scores(replace(exact, mask_heads=maps), exact.reach.blocks(block_q, block_k))
                both = torch.isfinite(ours) & torch.isfinite(theirs)
                apart = (ours - theirs)[both].abs()
                print(
                    f"check {name} {tokens}: same reach {torch.equal(ours.isneginf(), theirs.isneginf())}, apart mean "
                    f"{float(apart.mean()):.2e} most {float(apart.max()):.2e}, spread {float(theirs[both].std()):.2f}",
                    flush=True,
                )
            except Exception as failure:
                print(f"check {name} {tokens}: {type(failure).__name__}: {str(failure)[:600]}", flush=True)


def on_host(estimator: Gated) -> Gated:
    """The same gates on the CPU."""
    return Gated({
        phase: replace(gate, keys=gate.keys.cpu(), queries=None if gate.queries is None else gate.queries.cpu())
        for phase, gate in estimator.gates.items()
    })  # fmt: skip


def plans(density: float) -> dict[str, tuple[Estimator, int, int, str, Selector | None]]:
    """Estimator, block of queries, block of keys, whose lists, and selector (None: a threshold for that density)."""
    return {
        "seer_attention 64x64": (gates(HEADS), 64, 64, "query", TopK(density)),
        "seer_attention 128x128": (gates(HEADS), 128, 128, "query", TopK(density)),
        "infllm_v2 64x64, every query": (WindowMeans(32, 16, (128, 64)), 64, 64, "kv", TopK(density)),
        "infllm_v2 128x128, every query": (WindowMeans(32, 16, (128, 64)), 128, 128, "kv", TopK(density)),
        "infllm_v2 64x64, every 4th query": (WindowMeans(32, 16, (128, 64), every=4), 64, 64, "kv", TopK(density)),
        "infllm_v2 128x128, every 4th query": (WindowMeans(32, 16, (128, 64), every=4), 128, 128, "kv", TopK(density)),
        "sale 64x32, every query": (LowBitProducts(), 64, 32, "query", None),
        "sale 64x64, every query": (LowBitProducts(sink=64), 64, 64, "query", None),
        "sale 128x128, every query": (LowBitProducts(sink=128), 128, 128, "query", None),
        "sale 64x32, every 4th query": (LowBitProducts(every=4), 64, 32, "query", None),
        "sale 64x64, every 4th query": (LowBitProducts(sink=64, every=4), 64, 64, "query", None),
        "sale 128x128, every 4th query": (LowBitProducts(sink=128, every=4), 128, 128, "query", None),
    }


def threshold_for(plan: AttentionPlan, call: Call, density: float) -> Threshold:
    """A threshold that keeps about so many blocks."""
    call = plan.prepared(call)
    blocks = call.reach.blocks(plan.block_q, plan.block_k, torch.device(DEVICE))
    scores = plan.estimator.scores(call, blocks)[:, :, :: max(1, blocks.rows // 64)].float()
    found = scores[torch.isfinite(scores)]
    found = found[torch.randperm(len(found), device=found.device)[:1_000_000]]
    return Threshold(float(found.quantile(1 - density).exp()), normalized=False)


def measure(clock: Clock, tokens: int, density: float, rounds: int, only: str) -> list[Row]:
    query, key, value = tensors(tokens)
    call = call_of(query, key, value)
    calls: dict[str, Callable[[], Any]] = dict(dense(query, key, value))
    for name, (estimator, block_q, block_k, heads, selector) in plans(density).items():
        if only and only not in name:
            continue
        try:
            policy = Policy(dense_below=0, max_density=1.0)
            side: Any = heads
            plan = AttentionPlan(estimator, selector or TopK(density), policy, block_q, block_k, side)
            if selector is None:
                plan = replace(plan, selector=threshold_for(plan, call, density))
            ready = plan.prepared(call)
            blocks = call.reach.blocks(block_q, block_k, torch.device(DEVICE))
            found = plan.map(call)
            assert found is not None
            executor = choose("auto", query, call.source, found)
            print(f"{name} {tokens}: density {float(found.density().mean()):.3f}, {executor.name}", flush=True)
            fresh = lambda ready=ready: replace(ready, source=Plain(key, value))  # noqa: E731
            calls[f"{name} | estimate"] = lambda e=estimator, b=blocks, f=fresh: e.scores(f(), b)
            calls[f"{name} | execute"] = lambda x=executor, m=found: x.run(query, call.source, m, SCALING)
            calls[f"{name} | whole"] = lambda p=plan, f=fresh: p.attend(f())
        except Exception as failure:
            print(f"{name} {tokens}: {type(failure).__name__}: {str(failure)[:600]}", flush=True)
    times = clock(calls, rounds)
    peers = {name: times[name] for name in ("flash", "cudnn", "fa4") if name in times}
    for name, value_ in peers.items():
        print(f"  {tokens} dense {name}: {value_:.3f} ms", flush=True)
    rows: list[Row] = []
    for name, (estimator, *_) in plans(density).items():
        if f"{name} | whole" not in times:
            continue
        estimate, execute, whole = (times.get(f"{name} | {part}") for part in ("estimate", "execute", "whole"))
        assert estimate is not None and whole is not None
        fastest = min(peers.values())
        gains = ", ".join(f"{peer} {t / whole:.2f}x" for peer, t in peers.items())
        print(
            f"  {tokens} {name}: estimate {estimate:.3f} ms ({estimate / fastest:.1%} of dense), execute {execute}, "
            f"whole {whole:.3f}; {gains}",
            flush=True,
        )
        for peer, t in peers.items():
            rows.append({
                "goal": "A8", "job": f"{name}, {density:.0%}", "tokens": tokens, "peer": f"{peer}, dense",
                "ratio": t / whole, "milliseconds": whole, "estimate_milliseconds": estimate,
                "execute_milliseconds": execute, "peer_milliseconds": t, "share": estimate / fastest,
                "estimator": estimator.label,
            })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=50, help="at up to 32,768 tokens; fewer at more")
    parser.add_argument("--only", default="", help="plans whose names contain this")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after that many")
    options = parser.parse_args(argv)
    begin = time.monotonic()
    torch.manual_seed(0)
    clock = Clock()
    check()
    for tokens in options.tokens[: 1 if options.quick else None]:
        if time.monotonic() - begin > options.seconds:
            print(f"no time left for {tokens}")
            break
        rounds = max(3, options.rounds * 32768 // max(tokens, 32768))
        write(options, measure(clock, tokens, options.density, rounds, options.only), KEY)


if __name__ == "__main__":
    main()
