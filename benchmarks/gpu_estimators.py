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
        ("low bit 64x32", LowBitProducts, HEADS, 64, 32),
        ("low bit 64x64", lambda: LowBitProducts(sink=64), HEADS, 64, 64),
    ]
    for tokens in (1000, 2048):
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
        "infllm_v2 64x64": (WindowMeans(32, 16, (128, 64)), 64, 64, "kv", TopK(density)),
        "infllm_v2 128x128": (WindowMeans(32, 16, (128, 64)), 128, 128, "kv", TopK(density)),
        "infllm_v2 64x64, exact sums": (WindowMeans(32, 16), 64, 64, "kv", TopK(density)),
        "sale 64x32": (LowBitProducts(), 64, 32, "query", None),
        "sale 64x64": (LowBitProducts(sink=64), 64, 64, "query", None),
        "sale 128x128": (LowBitProducts(sink=128), 128, 128, "query", None),
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
    for name in plans(density):
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
            })  # fmt: skip
    return rows


def tune(clock: Clock, tokens: int, rounds: int) -> None:
    """Configurations of the two kernels that look at every query."""
    from rarefy.kernels.triton import anchored_scores as low
    from rarefy.kernels.triton import window_shares as windows

    query, key, _ = tensors(tokens)
    means = key.unfold(2, 32, 16).mean(-1)
    totals = windows.window_totals(query, means, size=32, stride=16, scaling=SCALING, offset=0)
    calls: dict[str, Callable[[], Any]] = {}
    for warps in (4, 8):
        calls[f"totals {warps} warps"] = lambda w=warps: windows.window_totals(
            query, means, size=32, stride=16, scaling=SCALING, offset=0, num_warps=w
        )
        for block in (64, 128):
            calls[f"shares {block} {warps} warps"] = lambda w=warps, b=block: windows.window_shares(
                query, means, totals, block_q=b, size=32, stride=16, scaling=SCALING, offset=0, num_warps=w
            )
    zero_q, zero_k = (torch.zeros(1, x.shape[1], CHANNELS, device=DEVICE) for x in (query, key))
    q_codes, k_codes = low.token_codes(query, zero_q, 7), low.token_codes(key, zero_k, 7)
    bias = torch.zeros(1, HEADS, tokens, device=DEVICE)
    calls["codes of queries"] = lambda: low.token_codes(query, zero_q, 7)
    for warps in (4, 8):
        for tile in (64, 128):
            for block_q, block_k in ((64, 32), (128, 64), (128, 128)):
                label = f"anchored {block_q}x{block_k} tile {tile} {warps} warps"
                calls[label] = lambda w=warps, t=tile, bq=block_q, bk=block_k: low.anchored_scores(
                    query, key, zero_k, q_codes, k_codes, bias, block_q=bq, block_k=bk, sink=bk, local=128,
                    scaling=SCALING, offset=0, tile=t, num_warps=w,
                )  # fmt: skip
    for name, milliseconds in clock(calls, rounds).items():
        print(f"  tune {tokens} {name}: {milliseconds:.3f} ms", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="plans whose names contain this")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after that many")
    options = parser.parse_args(argv)
    begin = time.monotonic()
    torch.manual_seed(0)
    clock = Clock()
    check()
    for number, tokens in enumerate(options.tokens[: 1 if options.quick else None]):
        if options.tune and number == min(2, len(options.tokens) - 1):
            tune(clock, 32768, 5)
        if time.monotonic() - begin > options.seconds:
            print(f"no time left for {tokens}")
            break
        write(options, measure(clock, tokens, options.density, options.rounds, options.only), KEY)


if __name__ == "__main__":
    main()
