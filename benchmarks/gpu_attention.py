"""Sparse prefill on one GPU against the best dense kernels, with estimators and selection in the time.

32 query heads over 8 KV heads of 128 channels in bf16, causal, one sequence; ``gpu_attention_decode.py`` decodes.
Inputs are normal random numbers. Before every call other numbers are read that fill the GPU's cache, and the GPU is
kept busy while the call is launched, as other layers keep it in a model; ``from_idle`` is the time without that.
Contenders take turns in one process, and times are medians. What a plan selects on random numbers says nothing of its
quality: densities here are asked for, and ``attention_accuracy.py`` says what they cost.

``ratio`` is the time of the peer over ours; ``kept_rate`` is density times the peer's time over ours (1: the dense
kernel's rate is kept at that density); ``max_rel_error`` that of the executor against softmax in float32 over the same
map, beside ``peer_error``, that of torch's dense kernel on a full one.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from harness import Row, arguments, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.attention.block_map import BlockMap
from rarefy.attention.call import Call
from rarefy.attention.estimators import Antidiagonals, Estimator, PooledMeans
from rarefy.attention.executors import Reference, executors
from rarefy.attention.plan import AttentionPlan
from rarefy.attention.policy import Policy
from rarefy.attention.reach import Reach
from rarefy.attention.report import PlanReport
from rarefy.attention.selectors import TopK
from rarefy.attention.selectors.fused import fused_map
from rarefy.attention.source import Plain
from rarefy.kernels.triton.block_attention import block_attention
from rarefy.kernels.triton.block_mass import block_mass
from rarefy.kernels.triton.block_select import select_blocks

KEY = ("job", "tokens", "density", "batch", "peer")
HEADS, KV_HEADS, CHANNELS = 32, 8, 128
SCALING = CHANNELS**-0.5
DEVICE = "cuda"
BUSY = 5_000_000  # cycles that launching the longest call does not take
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
PLANS = ("sparge:similarity=-1,density=0.1,block_q=128,block_k=128",)
Timed = dict[str, Callable[[], Any]]


class Clock:
    """Medians of calls that take turns, each after something else was read that fills the GPU's cache, as weights of
    other layers do. (Written numbers would still have to go to memory while the call runs.)"""

    def __init__(self) -> None:
        self.flush = torch.zeros(64 << 20, device=DEVICE)

    def __call__(self, calls: Timed, rounds: int, queued: bool = True) -> dict[str, float]:
        """Milliseconds of each; calls that fail are left out, with what they said. ``queued``: launched behind other
        work."""
        times: dict[str, list[float]] = {}
        for name, call in list(calls.items()):
            try:
                for _ in range(2):
                    call()
                torch.cuda.synchronize()
                times[name] = []
            except Exception as failure:
                print(f"  {name}: {type(failure).__name__}: {str(failure).splitlines()[0][:200]}", flush=True)
        for _ in range(rounds):
            for name in times:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush.sum()
                if queued:
                    torch.cuda._sleep(BUSY)
                begin.record()
                calls[name]()
                end.record()
                torch.cuda.synchronize()
                times[name].append(begin.elapsed_time(end))
        return {name: statistics.median(each) for name, each in times.items()}


def tensors(tokens: int, batch: int = 1, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, as views of ``[B, T, H, D]``, which is what models make."""
    shapes = ((queries or tokens, HEADS), (tokens, KV_HEADS), (tokens, KV_HEADS))
    found = [torch.randn(batch, n, h, CHANNELS, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for n, h in shapes]
    return found[0], found[1], found[2]


def dense(query: Tensor, key: Tensor, value: Tensor, causal: bool = True) -> Timed:
    def call(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=causal, scale=SCALING, enable_gqa=True
            )

    calls: Timed = {name: (lambda backend=backend: call(backend)) for name, backend in DENSE.items()}
    try:
        from flash_attn.cute.interface import flash_attn_func

        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        calls["fa4"] = lambda: flash_attn_func(q, k, v, softmax_scale=SCALING, causal=causal)
    except Exception as failure:
        print(f"flash-attn-4: {type(failure).__name__}: {failure}")
    return calls


def random_map(tokens: int, density: float, block_q: int, block_k: int, heads: int = HEADS) -> BlockMap:
    """The best ``density`` of random scores, diagonal and first block among them."""
    reach = Reach.last(tokens, tokens)
    blocks = reach.blocks(block_q, block_k, torch.device(DEVICE))
    scores = torch.rand(1, heads, blocks.rows, blocks.columns, device=DEVICE)
    forced = Policy().forced(reach, blocks, 0, heads, HEADS)
    rule = TopK(density).rule()
    assert rule is not None
    return fused_map(rule, scores, blocks, forced, reach)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def errors(names: set[str]) -> dict[str, float]:
    """The error of every executor on a random map, and of torch's dense kernel."""
    found: dict[str, float] = {}
    query, key, value = tensors(1024)
    wide = [part.float() for part in (query, key, value)]
    source = Plain(key, value)
    exact = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, scale=SCALING, enable_gqa=True)
    for name, call in dense(query, key, value).items():
        try:
            output = call()
            output = output[0] if isinstance(output, tuple) else output
            found[f"dense {name}"] = relative(output if output.shape == exact.shape else output.transpose(1, 2), exact)
        except Exception as failure:
            print(f"dense {name}: {type(failure).__name__}: {str(failure)[:300]}")
    for name, queries, block_q, block_k, heads in (
        ("fa4", 1024, 128, 128, HEADS),
        ("fa4 chunk", 300, 128, 128, HEADS),
        ("flex", 1024, 128, 128, HEADS),
        ("triton", 1024, 128, 128, HEADS),
        ("triton 64x64", 1024, 64, 64, HEADS),
        ("triton kv", 1024, 128, 64, KV_HEADS),
        ("triton chunk", 300, 64, 64, HEADS),
    ):
        if name not in names:
            continue
        try:
            reach = Reach.last(queries, 1024)
            blocks = reach.blocks(block_q, block_k, torch.device(DEVICE))
            scores = torch.rand(1, heads, blocks.rows, blocks.columns, device=DEVICE)
            forced = Policy().forced(reach, blocks, 0, heads, HEADS)
            rule = TopK(0.4).rule()
            assert rule is not None
            block_map = fused_map(rule, scores, blocks, forced, reach)
            plain = BlockMap.from_mask(TopK(0.4).select(scores, blocks.some, forced), reach, blocks)
            assert torch.equal(block_map.dense(), plain.dense()) and torch.equal(block_map.whole, plain.whole)
            part = query[:, :, -queries:]
            expected, expected_lse = Reference().run(part.float(), Plain(*wide[1:]), block_map, SCALING)
            executor = executors.get(name.split()[0])()
            reason = executor.refusal(part, source, block_map)
            if reason is not None:
                print(f"{name}: {reason}")
                continue
            output, lse = executor.run(part, source, block_map, SCALING)
            found[name] = relative(output, expected)
            print(
                f"error {name}: {found[name]:.2e}, log-sum-exp {float((lse - expected_lse).abs().max()):.1e}",
                flush=True,
            )
        except Exception as failure:
            print(f"error {name}: {type(failure).__name__}: {str(failure)[:400]}", flush=True)
            traceback.print_exc(limit=-3)
    return found


def tune(clock: Clock, tokens: int, rounds: int) -> None:
    """Triton's configurations on a random map of 10%."""
    query, key, value = tensors(tokens)
    for block_q, block_k, heads in ((128, 128, HEADS), (128, 64, HEADS), (64, 64, HEADS), (128, 64, KV_HEADS)):
        block_map = random_map(tokens, 0.1, block_q, block_k, heads)
        calls: Timed = {}
        for warps, stages in ((4, 2), (4, 3), (8, 2), (8, 3)):
            calls[f"{warps} warps, {stages} stages"] = (
                lambda block_map=block_map, block_q=block_q, block_k=block_k, warps=warps, stages=stages: (
                    block_attention(
                        query,
                        key,
                        value,
                        block_map.start,
                        block_map.whole,
                        block_map.count,
                        block_map.columns,
                        block_q=block_q,
                        block_k=block_k,
                        scaling=SCALING,
                        offset=0,
                        causal=True,
                        num_warps=warps,
                        num_stages=stages,
                    )
                )
            )
        times = clock(calls, rounds)
        print(
            f"triton {block_q}x{block_k}, {heads} lists, density {float(block_map.density().mean()):.3f}:",
            {name: round(each, 3) for name, each in times.items()},
            flush=True,
        )
    for size in (1, 2, 4, 8):
        scores = torch.randn(1, HEADS, tokens // 128, tokens // 128, device=DEVICE)
        out = select_blocks(scores, share=0.1)
        times = clock(
            {
                "select": lambda scores=scores, out=out, size=size: select_blocks(
                    scores, share=0.1, out=out, num_warps=size
                )
            },
            rounds,
        )
        print(f"select with {size} warps: {times}", flush=True)


def execution(clock: Clock, tokens: int, rounds: int, found: dict[str, float], peers: dict[str, float]) -> list[Row]:
    """Executors alone on given maps."""
    query, key, value = tensors(tokens)
    source = Plain(key, value)
    rows: list[Row] = []
    for density in (0.5, 0.2, 0.1, 0.05):
        calls: Timed = {}
        real: dict[str, float] = {}
        for label, block_q, block_k in (
            ("fa4", 128, 128),
            ("triton", 128, 128),
            ("triton 64x64", 64, 64),
            ("flex", 128, 128),
        ):
            if label == "flex" and (density != 0.1 or tokens != 32768 or label not in found):
                continue
            block_map = random_map(tokens, density, block_q, block_k)
            executor = executors.get(label.split()[0])()
            reason = executor.refusal(query, source, block_map)
            if reason is not None:
                print(f"  {label}: {reason}")
                continue
            real[label] = float(block_map.density().mean())
            calls[label] = lambda executor=executor, block_map=block_map: executor.run(
                query, source, block_map, SCALING
            )
        for label, milliseconds in clock(calls, rounds).items():
            rows.append(
                {
                    "goal": "execution",
                    "job": f"execution alone, {label}",
                    "tokens": tokens,
                    "density": density,
                    "batch": 1,
                    "peer": "cuDNN dense",
                    "measured_density": round(real[label], 4),
                    "milliseconds": round(milliseconds, 4),
                    "peer_milliseconds": round(peers["cudnn"], 4),
                    "ratio": round(peers["cudnn"] / milliseconds, 3),
                    "kept_rate": round(real[label] * peers["cudnn"] / milliseconds, 3),
                    "max_rel_error": found.get(label),
                    "peer_error": found.get("dense cudnn"),
                    "rounds": rounds,
                    "note": "given random map",
                }
            )
            print(
                tokens,
                density,
                label,
                f"{milliseconds:.3f} ms, {rows[-1]['ratio']}x cuDNN, rate kept {rows[-1]['kept_rate']}",
                flush=True,
            )
    return rows


def plans() -> dict[str, tuple[Estimator, str]]:
    """What scores blocks, and who executes."""
    return {
        "pooled means": (PooledMeans(), "auto"),
        "pooled means, triton": (PooledMeans(), "triton"),
        "pooled means with likeness": (PooledMeans(0.0), "auto"),
        "antidiagonals of 16": (Antidiagonals(16), "auto"),
    }


def prefill(clock: Clock, tokens: int, rounds: int, peers: dict[str, float]) -> list[Row]:
    """Whole plans at 10%: estimate, select, execute."""
    query, key, value = tensors(tokens)
    rows: list[Row] = []
    reach = Reach.last(tokens, tokens)
    for label, (estimator, executor) in plans().items():
        policy = Policy(dense_below=0, max_density=1.0)
        plan = AttentionPlan(estimator, TopK(0.1), policy, 128, 128, "query", executor)
        report = PlanReport()
        blocks = reach.blocks(128, 128, torch.device(DEVICE))

        def call(plan: AttentionPlan = plan, report: PlanReport = report) -> Any:
            return plan.attend(Call(query, Plain(key, value), reach, SCALING), report)

        def estimate(plan: AttentionPlan = plan, blocks: Any = blocks) -> Any:
            return plan.estimator.scores(Call(query, Plain(key, value), reach, SCALING, mask_heads=HEADS), blocks)

        def select(plan: AttentionPlan = plan) -> Any:
            return plan.map(Call(query, Plain(key, value), reach, SCALING))

        times = clock({"whole": call, "estimate": estimate, "map": select}, rounds)
        if "whole" not in times:
            continue
        idle = clock({"whole": call}, max(5, rounds // 3), queued=False)["whole"]
        found = plan.map(Call(query, Plain(key, value), reach, SCALING))
        density = float(found.density().mean()) if found is not None else 1.0
        for peer in peers:
            rows.append(
                {
                    "goal": "prefill",
                    "job": f"plan, {label}",
                    "tokens": tokens,
                    "density": 0.1,
                    "batch": 1,
                    "peer": f"dense {peer}",
                    "measured_density": round(density, 4),
                    "milliseconds": round(times["whole"], 4),
                    "from_idle": round(idle, 4),
                    "peer_milliseconds": round(peers[peer], 4),
                    "ratio": round(peers[peer] / times["whole"], 3),
                    "estimator": estimator.label,
                    "executor": next(iter(report.layers[0].executors)),
                    "estimator_share": round(times["estimate"] / peers[peer], 4),
                    "estimator_and_selection_share": round(times["map"] / peers[peer], 4),
                    "rounds": rounds,
                    "note": "estimator and selection included",
                }
            )
        print(
            tokens,
            label,
            f"density {density:.3f}: {times['whole']:.3f} ms (estimate {times['estimate']:.3f}, with selection "
            f"{times['map']:.3f});",
            {p: round(t / times["whole"], 2) for p, t in peers.items()},
            flush=True,
        )
        del found
    return rows


def masses(clock: Clock, tokens: int, peers: dict[str, float], rounds: int) -> list[Row]:
    """The exact masses of all blocks, which training targets and oracles take."""
    query, key, _ = tensors(tokens)
    times = clock(
        {
            f"{warps} warps, {stages} stages": (
                lambda warps=warps, stages=stages: block_mass(
                    query, key, block_q=128, block_k=128, scaling=SCALING, offset=0, num_warps=warps, num_stages=stages
                )
            )
            for warps, stages in ((4, 2), (8, 2), (8, 3))
        },
        rounds,
    )
    print(f"block masses {tokens}: {times}; cuDNN dense {peers['cudnn']:.2f} ms", flush=True)
    if not times:
        return []
    best = min(times.values())
    return [
        {
            "goal": "statistics",
            "job": "masses of all blocks",
            "tokens": tokens,
            "density": 1.0,
            "batch": 1,
            "peer": "dense cudnn",
            "milliseconds": round(best, 4),
            "peer_milliseconds": round(peers["cudnn"], 4),
            "ratio": round(peers["cudnn"] / best, 3),
            "note": "no values are read",
        }
    ]


def whole(tokens: int, plan: str, rounds: int) -> list[Row]:
    """Four layers of an 8B model in Transformers: the first token of a prompt, and tokens after it, eagerly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import rarefy
    from rarefy.integrations.transformers.plan_evaluation import set_plan

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=CHANNELS, num_hidden_layers=4, vocab_size=1024, max_position_embeddings=tokens + 256,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    prompt = torch.randint(0, 1024, (1, tokens), device=DEVICE)
    times: dict[str, dict[str, float]] = {}
    reports: dict[str, Any] = {}
    for name in ("dense", plan):
        setup = rarefy.set_attention(model, None) if name == "dense" else set_plan(model, plan)
        if name == "dense":
            model.set_attn_implementation("sdpa")
        own: dict[str, list[float]] = {"first token": [], "next token": []}
        for number in range(rounds + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            with torch.inference_mode():
                found = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
                torch.cuda.synchronize()
                first = time.perf_counter() - begin
                cache = getattr(found, "cache", None) or found.past_key_values
                argument = "cache" if hasattr(found, "cache") else "past_key_values"
                begin = time.perf_counter()
                for _ in range(16):
                    model(input_ids=prompt[:, :1], use_cache=True, **{argument: cache})
                torch.cuda.synchronize()
            if number:
                own["first token"].append(first)
                own["next token"].append((time.perf_counter() - begin) / 16)
            del found, cache
        times[name] = {part: statistics.median(each) for part, each in own.items()}
        if setup is not None:
            reports = {"density": round(setup.report.density(), 4), "executors": dict(setup.report.layers[0].executors)}
    rows: list[Row] = []
    for part, dense_time in times["dense"].items():
        rows.append({
            "goal": "whole", "job": f"{part}, {plan}", "tokens": tokens, "density": 0.1, "batch": 1, "peer": "sdpa",
            "milliseconds": round(times[plan][part] * 1e3, 3), "peer_milliseconds": round(dense_time * 1e3, 3),
            "ratio": round(dense_time / times[plan][part], 3), "note": "4 layers of an 8B shape, eager", **reports,
        })  # fmt: skip
        print(tokens, rows[-1], flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so long")
    parser.add_argument("--tune", action="store_true", help="try configurations of the kernels first")
    parser.add_argument("--tokens", default="32768,8192,131072,16384,65536", help="lengths of prefill; 0 for none")
    parser.add_argument(
        "--check",
        default="fa4,fa4 chunk,flex,triton,triton 64x64,triton kv,triton chunk",
        help="executors to hold to the reference first, which compiles them",
    )
    parser.add_argument("--whole", default="32768,131072", help="lengths of prompts for layers of a model; 0 for none")
    options = parser.parse_args()
    begin = time.monotonic()
    torch.manual_seed(0)
    clock = Clock()
    found = errors(set(options.check.split(",")))
    rows: list[Row] = []

    def attempt(name: str, function: Callable[[], list[Row] | None]) -> None:
        if time.monotonic() - begin > options.seconds:
            print(f"{name}: no time left")
            return
        try:
            rows.extend(function() or [])
        except Exception as failure:
            print(f"{name}: {type(failure).__name__}: {str(failure)[:500]}", flush=True)
            traceback.print_exc(limit=-4)
        torch.cuda.empty_cache()
        if options.json is not None:
            write(options, rows, KEY)
        print(f"[{time.monotonic() - begin:.0f} s] {name} done", flush=True)

    if options.tune:
        attempt("tune", lambda: tune(clock, 32768, 10))
    for tokens in (int(part) for part in options.whole.split(",") if int(part)):
        for plan in PLANS:
            attempt(f"whole {tokens}", lambda n=tokens, plan=plan: whole(n, plan, 3))
    for tokens in (int(part) for part in options.tokens.split(",") if int(part)):
        rounds = max(7, (20 if options.quick else 50) * 32768 // max(tokens, 32768))
        peers: dict[str, float] = {}

        def measure(tokens: int = tokens, rounds: int = rounds, peers: dict[str, float] = peers) -> list[Row]:
            peers.update(clock(dense(*tensors(tokens)), rounds))
            print(f"dense {tokens}:", {name: round(each, 3) for name, each in peers.items()}, flush=True)
            return []

        attempt(f"dense {tokens}", measure)
        if "cudnn" not in peers:
            continue
        attempt(f"plans {tokens}", lambda t=tokens, r=rounds, p=peers: prefill(clock, t, r, p))  # type: ignore[misc]
        attempt(f"execution {tokens}", lambda t=tokens, r=rounds, p=peers: execution(clock, t, r, found, p))  # type: ignore[misc]
        if tokens <= 32768 and not options.quick:
            attempt(f"masses {tokens}", lambda t=tokens, p=peers: masses(clock, t, p, 10))  # type: ignore[misc]
    if options.json is None:
        write(options, rows, KEY)


if __name__ == "__main__":
    main()
