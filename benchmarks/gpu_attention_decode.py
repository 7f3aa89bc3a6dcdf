"""One new token over chosen blocks of a cache, in 16 bits and in code, against dense attention over a 16-bit cache.

Shapes, inputs and clock are those of ``gpu_attention.py``; each step is a CUDA graph of scores of all blocks, their
choice, and attention over the chosen. Rows of both scripts may share a file. Codes are random bits with random scales,
which take as long to read as any. Rows ``plan, ...`` are plans over rarefy's cache as a model has them: as a graph,
and ``from_idle`` as they run without one, launched by Python, beside the dense kernel launched likewise;
``max_rel_error`` is that against softmax in float32 over the same blocks, of coded
caches for one head of one sequence, whose numbers are decoded as ``packing`` unpacks them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from gpu_attention import CHANNELS, DEVICE, HEADS, KEY, KV_HEADS, SCALING, Clock, Timed, dense, relative, tensors
from gpu_estimators import POOLS, call_of
from graphs import graph_of
from harness import Row, arguments, write
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.estimators import Estimator, Extremes, PooledMeans
from rarefy.attention.estimators.gated import Gated
from rarefy.attention.estimators.windowed import WindowMeans
from rarefy.attention.executors import Triton
from rarefy.attention.gate import BlockGate
from rarefy.attention.plan import AttentionPlan
from rarefy.attention.policy import Policy
from rarefy.attention.report import PlanReport
from rarefy.attention.selectors import TopK
from rarefy.attention.source import Stored
from rarefy.kernels.coded import Tiles
from rarefy.kernels.triton.block_decode import BlockDecode, choose_blocks
from rarefy.kernels.triton.decode_attention import DecodeAttention
from rarefy.kv.codecs import Exact
from rarefy.kv.plan import LayerCodecs
from rarefy.kv.store import LayerStore
from rarefy.packing import unpack_bits

Lists = tuple[Tensor, Tensor]  # blocks int32 [B, Hkv, capacity], and how many of them are meant int32 [B, Hkv]
DENSITY = 0.1
RUN = 2048  # tokens of a run of codes
GROUP = 128  # codes that share a scale
# Tokens of a block, and whether its summary is a range of each channel and not a mean.
PLAIN = ((64, False), (128, False), (64, True))
# Other configurations of both kernels: tokens of a tile, warps, stages, programs that share a list; blocks that a
# program gives scores to, and its warps.
OTHERS = (
    (64, 4, 3, 2, 64, 4), (64, 4, 3, 2, 32, 1), (64, 4, 3, 2, 64, 1), (64, 4, 3, 2, 64, 2), (64, 4, 4, 1, 32, 1),
    (64, 8, 3, 2, 32, 1), (32, 4, 4, 4, 32, 1), (64, 4, 3, 4, 32, 1), (64, 4, 3, 3, 32, 2), (64, 4, 2, 3, 32, 1),
)  # fmt: skip
# Bits, whether keys have a scale for each channel or each token, and tokens of a block.
CODED: tuple[tuple[int, Literal["channel", "token"], int], ...] = (
    (4, "channel", 128), (4, "token", 64), (4, "channel", 64), (2, "channel", 128),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A step over a cache. ``attend``: attention over the blocks that ``choose`` chooses, as ``lists`` reads them;
    ``expected`` makes what it should be of which blocks each KV head reads (bool ``[B, Hkv, tokens]``). Of a
    plan, ``eager`` is the step as a model takes it, without a graph, and ``estimator`` what scores blocks."""

    label: str
    choose: Callable[[], Any]
    attend: Callable[[Any], Tensor]
    block: int
    expected: Callable[[Tensor], tuple[Tensor, Tensor]]
    lists: Callable[[Any], Lists] = tuple
    eager: Callable[[], Any] | None = None
    estimator: str = ""

    def whole(self) -> Tensor:
        return self.attend(self.choose())

    def error(self) -> float:
        """How far the attention over the blocks that were chosen is from what it should be."""
        found = self.choose()
        output = self.attend(found)
        index, count = self.lists(found)
        place = torch.arange(index.shape[-1], device=DEVICE) < count[..., None]
        mask = torch.zeros(*count.shape, index.shape[-1] + 1, dtype=torch.bool, device=DEVICE)
        mask.scatter_(2, torch.where(place, index.long(), mask.shape[2] - 1), True)
        expected, heads = self.expected(mask[..., :-1].repeat_interleave(self.block, 2))
        return relative(output[: len(expected), heads], expected)


def chooser(query: Tensor, keys: Tensor, block: int, bound: bool, **own: Any) -> Callable[[], Lists]:
    """Scores of all blocks of ``keys`` and the choice of the best."""
    batch, _, tokens, _ = keys.shape
    pages = keys.unflatten(2, (-1, block))
    high, low = (pages.amax(3), pages.amin(3)) if bound else (pages.mean(3), None)
    high, low = high.contiguous(), None if low is None else low.contiguous()
    length = torch.full((batch,), tokens, dtype=torch.int32, device=DEVICE)
    options: dict[str, Any] = {"tokens": block, "scaling": SCALING, "share": DENSITY, "low": low, **own}

    def choose() -> Lists:
        _, _, count, columns = choose_blocks(query, high, length, tokens // block, **options)
        return columns.view(batch, KV_HEADS, -1), count[:, :, 0]

    return choose


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Softmax in float32 over the tokens of ``mask``, ``[B, H, D]``."""
    scores = query.unflatten(1, (key.shape[1], -1)).float() @ key.float().mT * SCALING
    return (scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1) @ value.float()).flatten(1, 2)


def plain_job(
    query: Tensor, key: Tensor, value: Tensor, block: int, bound: bool, choice: dict[str, int], **options: Any
) -> Job:
    batch, _, tokens, _ = key.shape
    choose = chooser(query, key, block, bound, **choice)
    length = torch.full((batch,), tokens, dtype=torch.int32, device=DEVICE)
    run = BlockDecode(batch, KV_HEADS, HEADS, CHANNELS, block, device=torch.device(DEVICE), **options)

    def attend(found: Lists) -> Tensor:
        return run(query, key, value, *found, length, SCALING)[0]

    def expected(mask: Tensor) -> tuple[Tensor, Tensor]:
        return attention(query, key, value, mask), torch.arange(HEADS, device=DEVICE)

    label = f"{'extremes' if bound else 'means'} of {block}" + "".join(
        f", {name} {value}" for name, value in (*options.items(), *((f"choice {n}", v) for n, v in choice.items()))
    )
    return Job(label, choose, attend, block, expected)


def codes(kind: str, num_bits: int, batch: int, tokens: int) -> Tiles:
    """Random codes of a cache."""
    runs = []
    for _ in range(tokens // RUN):
        words = RUN * CHANNELS * num_bits // 32
        stream = torch.randint(-(2**31), 2**31, (batch, KV_HEADS, words), dtype=torch.int32, device=DEVICE)
        steps = torch.rand(batch, KV_HEADS, RUN * CHANNELS // GROUP, device=DEVICE) * 4 / 2**num_bits
        zeros = torch.rand(steps.shape, device=DEVICE) * 2**num_bits
        runs.append((stream, steps.half(), zeros.half()))
    return Tiles(kind, tuple(runs), num_bits, GROUP if kind == "channel" else 1, GROUP)


def decoded(side: Tiles, row: int, head: int) -> Tensor:
    """Numbers of one head, float32 ``[tokens, D]``."""
    parts = []
    for stream, steps, zeros in side.runs:
        numbers = unpack_bits(stream[row, head, None].cpu(), side.num_bits, RUN * CHANNELS).float().view(-1, GROUP)
        numbers = (numbers - zeros[row, head].cpu().float()[:, None]) * steps[row, head].cpu().float()[:, None]
        # By channel: blocks of GROUP tokens, each channel's tokens in a row.
        parts.append(numbers.view(-1, CHANNELS, GROUP).mT.reshape(-1, CHANNELS) if side.kind == "channel" else numbers)
    return torch.cat(parts).to(DEVICE)


def coded_job(query: Tensor, key: Tensor, num_bits: int, kind: str, block: int, **options: Any) -> Job:
    """Keys and values in code; blocks are chosen by means of other keys, since these are random either way."""
    batch, _, tokens, _ = key.shape
    choose = chooser(query, key, block, False)
    keys, values = codes(kind, num_bits, batch, tokens), codes("token", num_bits, batch, tokens)
    run = DecodeAttention(
        keys, values, batch, KV_HEADS, HEADS, CHANNELS, RUN, device=torch.device(DEVICE), block=block, **options
    )

    def attend(found: Lists) -> Tensor:
        return run(query, SCALING, found)[0]

    def expected(mask: Tensor) -> tuple[Tensor, Tensor]:
        own = [decoded(side, 0, 1)[None, None] for side in (keys, values)]
        heads = torch.arange(HEADS // KV_HEADS, 2 * HEADS // KV_HEADS, device=DEVICE)
        return attention(query[:1, heads], own[0], own[1], mask[:1, 1:2]), heads

    label = f"{num_bits} bits, keys by {kind}, means of {block}"
    return Job(label, choose, attend, block, expected)


def plan_job(query: Tensor, key: Tensor, value: Tensor, label: str, block: int = 64) -> Job:
    """A plan as a model has it, over rarefy's own cache, which keeps what the estimator knows of blocks."""
    store = LayerStore(LayerCodecs(Exact(key.dtype), Exact(key.dtype)))
    source = Stored(store.append(key, value))
    policy = Policy(dense_below=0, max_density=1.0)
    call = replace(call_of(query[:, :, None], key, value), source=source)
    estimator, report = PLANS[label](), PlanReport()
    plan = AttentionPlan(estimator, TopK(DENSITY), policy, block, block, "kv", "triton")

    def lists(block_map: BlockMap) -> Lists:
        newest = block_map.newest()
        return newest.index, newest.count

    def attend(block_map: BlockMap) -> Tensor:
        return Triton().run(call.query, source, block_map, SCALING)[0][:, :, 0]

    def expected(mask: Tensor) -> tuple[Tensor, Tensor]:
        return attention(query, key, value, mask[..., : key.shape[2]]), torch.arange(HEADS, device=DEVICE)

    return Job(
        f"plan, {label}", lambda: plan.map(call, report), attend, block, expected, lists,
        lambda: plan.attend(call, report), estimator.label,
    )  # fmt: skip


def decode_gate() -> Gated:
    gate = BlockGate.new(HEADS, KV_HEADS, CHANNELS, POOLS, True)
    parts = {name: part.to(DEVICE, torch.bfloat16) for name, part in gate.tensors("decode").items()}
    return Gated({"decode": BlockGate.of(parts, "decode", POOLS)})


# What estimates, in blocks of 64 tokens.
PLANS: dict[str, Callable[[], Estimator]] = {
    "means of 64": PooledMeans,
    "extremes of 64": Extremes,
    "gate of 64": decode_gate,
    "windows of 32": lambda: WindowMeans(32, 16, (128, 64)),
}


def measure(
    clock: Clock, batch: int, tokens: int, rounds: int, kinds: Sequence[str], others: bool, keep: Callable[[Row], None]
) -> None:
    """One new token in each sequence. Rows are kept as they come."""
    query, key, value = tensors(tokens, batch, 1)
    key, value = key.contiguous(), value.contiguous()
    one = query[:, :, 0].contiguous()
    graphs: Timed = {}
    peers_eager = dense(query, key, value, causal=False)
    for name, call in peers_eager.items():
        try:
            graphs[name] = graph_of([call]).replay
        except Exception as failure:
            print(f"  decode {name}: {type(failure).__name__}: {str(failure).splitlines()[0][:200]}")
            torch.cuda.synchronize()
    size = 2 * batch * KV_HEADS * tokens * CHANNELS * 2
    known: dict[str, list[Callable[[], Job]]] = {
        "plan": [lambda name=name: plan_job(one, key, value, name) for name in PLANS],  # type: ignore[misc]
        "plain": [lambda b=b, e=e: plain_job(one, key, value, b, e, {}) for b, e in PLAIN],  # type: ignore[misc]
        "coded": [lambda n=n, k=k, b=b: coded_job(one, key, n, k, b) for n, k, b in CODED],  # type: ignore[misc]
    }
    makers = [make for kind in kinds for make in known[kind]]
    if others:
        makers = [
            lambda t=t, w=w, s=s, p=p, n=n, c=c: plain_job(  # type: ignore[misc]
                one, key, value, 64, False, {"tile": n, "num_warps": c}, tile=t, num_warps=w, num_stages=s, splits=p
            )
            for t, w, s, p, n, c in OTHERS
        ]
    for make in makers:
        label, stage = "", "making"
        try:
            # A graph reads the memory of its calls and does not hold it, so the job has to live until the end.
            job = make()
            label, stage = job.label, "check"
            error = job.error()
            torch.cuda.synchronize()
            stage = "graph"
            own: Timed = {label: graph_of([job.whole]).replay, "choice": graph_of([job.choose]).replay}
            lists = job.choose()
            own["attention"] = graph_of([lambda job=job, lists=lists: job.attend(lists)]).replay  # type: ignore[misc]
            torch.cuda.synchronize()
            times = clock({**graphs, **own}, rounds)
            idle: dict[str, float] = {}
            if job.eager is not None:
                idle = clock({"plan": job.eager, **peers_eager}, rounds, queued=False)
        except Exception as failure:
            print(f"  {label}, {stage}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
            torch.cuda.synchronize()
            continue
        peers = {name: times[name] for name in graphs if name in times}
        peer = min(peers, key=lambda name: peers[name])
        parts = {part: round(times[part] * 1e3, 1) for part in ("choice", "attention")}
        row = {
            "goal": "decode", "job": f"decode, {label}", "tokens": tokens, "density": DENSITY, "batch": batch,
            "peer": f"dense {peer}", "microseconds": round(times[label] * 1e3, 2),
            "peer_microseconds": round(peers[peer] * 1e3, 2), "ratio": round(peers[peer] / times[label], 3),
            "max_rel_error": error, "dense_gigabytes_per_second": round(size / peers[peer] / 1e6),
            "parts_microseconds": parts, "note": "scores and choice of blocks included; CUDA graph",
        }  # fmt: skip
        if idle:
            row["estimator"] = job.estimator
            row["from_idle"] = round(idle.pop("plan") * 1e3, 2)
            row["peer_from_idle"] = round(min(idle.values()) * 1e3, 2)
        keep(row)
        about = f"decode {batch} x {tokens}, {label}: {row['microseconds']} us, {row['ratio']}x {peer},"
        print(
            about,
            f"error {error:.1e}",
            parts,
            row.get("from_idle"),
            row.get("peer_from_idle"),
            {name: round(ms * 1e3, 1) for name, ms in peers.items()},
            flush=True,
        )


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no new length after so long")
    parser.add_argument("--cases", default="16x32768,1x131072,1x32768,4x32768,16x8192", help="batches and lengths")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--kinds", nargs="+", default=["plan", "plain", "coded"], help="what to measure, in this order")
    parser.add_argument("--others", action="store_true", help="try other configurations of the kernels instead")
    options = parser.parse_args()
    begin = time.monotonic()
    torch.manual_seed(0)
    clock = Clock()
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        if options.json is not None:
            write(options, rows, KEY)

    kinds = options.kinds[:1] if options.quick else options.kinds
    for case in options.cases.split(","):
        if time.monotonic() - begin > options.seconds:
            print(f"decode {case}: no time left")
            break
        batch, length = (int(part) for part in case.split("x"))
        measure(clock, batch, length, options.rounds, kinds, options.others, keep)
        torch.cuda.empty_cache()
    if options.json is None:
        write(options, rows, KEY)


if __name__ == "__main__":
    main()
