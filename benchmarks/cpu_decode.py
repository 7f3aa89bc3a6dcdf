"""Decoding on a CPU: compressed Llamas against llama.cpp and Transformers, in one process and in turns.

``--shape demo``, a compressed SmolLM2, has the jobs ``decode`` (goal C2) and ``prefill`` (C4) on one thread;
``threads`` (C5), two of them, idle and with one process that competes for them; ``first-token`` of ``rarefy chat`` from
the start of its process, against importing Torch and Transformers' Llama. Quality stands beside: perplexity of all, and
KL of both executors from the dense model, on the same windows. Other shapes have random weights, and decode (C3) and
prefill (C4) on one thread in several kinds of storage (``benchmarks/random_llama.py``).
llama.cpp reads the same weights, written as F16 and quantized by its own quantizer (``benchmarks/gguf_peer.py``).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf_peer
import random_llama
import torch
from harness import Row, arguments, write

import rarefy
from rarefy.contracts import Recipe, Rule
from rarefy.evaluation.protocol import bos_token
from rarefy.evaluation.scoring import Scorer
from rarefy.evaluation.speed import Decoder, SpeedComparison, measure
from rarefy.integrations.peers import LlamaCppDecoder, RunnerDecoder, TransformersDecoder, step_bytes
from rarefy.sources.models import open_model
from rarefy.sources.texts import open_text
from rarefy.sources.windows import tokenize, windows

KEY = ("goal", "job", "peer")
PROMPT, LONG_PROMPT, NEW = 128, 256, 64
DEMO_JOBS = ("decode", "prefill", "threads", "first-token")
IMPORTS = "import torch; from transformers import LlamaForCausalLM"
Logits = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", default="demo", choices=["demo", *random_llama.SHAPES])
    parser.add_argument("--kinds", nargs="+", default=list(random_llama.KINDS), choices=list(random_llama.KINDS))
    parser.add_argument("--jobs", nargs="+", default=list(DEMO_JOBS), choices=DEMO_JOBS, help="of the demo")
    parser.add_argument("--recipe", default="gptq", help="id of the weight recipe, of the layers; the head takes rtn")
    parser.add_argument("--samples", type=int, default=128, help="sequences of 512 tokens that it calibrates on")
    parser.add_argument("--work-dir", type=Path, help="keep the compressed model and the GGUF files here")
    options = parser.parse_args()
    busy = os.getloadavg()[0]
    load = f"{busy:.0f} other processes ran on {os.cpu_count()} cores when it began"
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work_dir or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if options.shape == "demo":
            rows = of_the_demo(work, options)
        else:
            rows = [row for kind in options.kinds for row in of_a_shape(options.shape, kind, work, options.quick)]
    write(options, [{**row, "load": load} for row in rows], KEY)


def of_the_demo(work: Path, options: Any) -> list[Row]:
    small = compressed(work / options.recipe, options.recipe, options.samples)
    rows, quality = measured(small, llama_cpp_file(work), options.jobs, options.quick)
    made = "" if options.recipe == "rtn" else f" on {options.samples} x 512 tokens of the demo's calibration text"
    quality = f"layers {options.recipe} int4 g64{made}, head rtn int4 g32; {quality}"
    return [{**row, "quality": quality} for row in rows]


def of_a_shape(shape: str, kind: str, work: Path, quick: bool) -> list[Row]:
    """Rows of a Llama with random weights, its layers in ``kind``."""
    gguf = random_llama.llama_cpp_file(shape, kind, work)
    model = random_llama.compressed(shape, kind, work)
    torch.set_num_threads(1)
    decoders: list[Decoder] = [RunnerDecoder(model, "fast")]
    length = LONG_PROMPT + NEW
    if gguf is None:
        print(f"{kind}: this llama.cpp has no {random_llama.KINDS[kind][1]}", file=sys.stderr)
    else:
        decoders.append(LlamaCppDecoder(gguf, length))
    weights = sum(parameter.numel() for parameter in rarefy.load(random_llama.dense(shape, work)).parameters())
    if kind == next(iter(random_llama.KINDS)):
        dense: Any = rarefy.load(random_llama.dense(shape, work), dtype="bfloat16")
        decoders.append(TransformersDecoder(dense, False, length))
    result = contest(decoders, LONG_PROMPT, 8 if quick else 32, 3 if quick else 7, 1)
    shared = {"bits_per_weight": 8 * step_bytes(model) / weights, "quality": f"random weights, {kind}"}
    rows = decode_rows(result, "C3", f"{shape} {kind}, decode after {LONG_PROMPT}", shared)
    rows += prefill_rows(result, f"{shape} {kind}, prefill {LONG_PROMPT}", shared)
    del model, decoders
    gc.collect()
    return [{**row, "peer_bits_per_weight": 8 * row.pop("peer_bytes") / weights} for row in rows]


def compressed(folder: Path, method: str, samples: int) -> Path:
    """The demo model with its layers in 4 bits in groups of 64, and its head in groups of 32; made once."""
    if not (folder / "config.json").is_file():
        grid = {"num_bits": 4, "group_size": 64, "clip": "mse"}
        head = Rule(targets=("lm_head",), method="rtn", options={**grid, "group_size": 32})
        recipe = Recipe(name=method, rules=(head, Rule(method=method, options=grid)))
        data = {} if method == "rtn" else {"data": "demo", "samples": samples, "seq_len": 512}
        rarefy.compress("demo", recipe, out=folder, overwrite=True, **data)
    return folder


def llama_cpp_file(work: Path) -> Path:
    """The demo model in Q4_0, made once."""
    out = work / "demo-q4_0.gguf"
    if not out.is_file():
        gguf_peer.write_f16(open_model("demo").folder, work / "demo-f16.gguf")
        gguf_peer.quantize(work / "demo-f16.gguf", out, "Q4_0")
    return out


def contest(decoders: Sequence[Decoder], prompt: int, new: int, rounds: int, threads: int) -> SpeedComparison:
    """``decoders`` in turns on a random prompt; the first is ours."""
    tokens = torch.randint(10, 90, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    torch.set_num_threads(threads)
    result = measure(decoders, tokens, new, rounds)
    for row in result.rows:
        speeds = f"{row.decode_tokens_per_second:.1f} tokens/s after {row.prefill_tokens_per_second:.0f}"
        print(f"{prompt} + {new}, {threads} threads: {row.executor}: {speeds}", file=sys.stderr)
    return result


def decode_rows(result: SpeedComparison, goal: str, job: str, shared: Row) -> list[Row]:
    ours = result.rows[0]
    read = f"one thread reads {result.read_bytes_per_second / 1e9:.1f} GB/s"
    return [
        {
            "goal": goal, "job": job, "peer": row.executor, "ratio": row.decode_ratio, **shared,
            "fraction_of_limit": ours.fraction_of_read, "peer_bytes": row.step_bytes,
            "note": f"{ours.decode_tokens_per_second:.1f} against {row.decode_tokens_per_second:.1f} tokens/s, {read}",
        }
        for row in result.rows[1:]
    ]  # fmt: skip


def prefill_rows(result: SpeedComparison, job: str, shared: Row) -> list[Row]:
    ours = result.rows[0]
    return [
        {
            "goal": "C4", "job": job, "peer": row.executor, "ratio": row.prefill_ratio, **shared,
            "peer_bytes": row.step_bytes,
            "note": f"{ours.prefill_tokens_per_second:.0f} against {row.prefill_tokens_per_second:.0f} tokens/s",
        }
        for row in result.rows[1:]
    ]  # fmt: skip


def measured(small: Path, gguf: Path, jobs: Sequence[str], quick: bool) -> tuple[list[Row], str]:
    rounds, new = (3, 16) if quick else (9, NEW)
    model: Any = rarefy.load(small)
    dense: Any = rarefy.load("demo")
    quality = qualities(model, dense, gguf, 4 if quick else 12)
    weights = sum(parameter.numel() for parameter in dense.parameters())
    shared = {"bits_per_weight": 8 * step_bytes(model) / weights, "max_rel_error": logit_error(model)}
    rows: list[Row] = []
    length = LONG_PROMPT + NEW
    torch.set_num_threads(1)
    ours = RunnerDecoder(model, "fast")
    all_peers: list[Decoder] = [
        ours, LlamaCppDecoder(gguf, length), TransformersDecoder(dense, False, length),
        TransformersDecoder(rarefy.load("demo", dtype="bfloat16"), False, length),
    ]  # fmt: skip
    if "decode" in jobs:
        result = contest(all_peers, PROMPT, new, rounds, 1)
        rows += decode_rows(result, "C2", f"decode after {PROMPT}", shared)
        rows += prefill_rows(result, f"prefill {PROMPT}", shared)
    if "prefill" in jobs:
        rows += prefill_rows(contest(all_peers, LONG_PROMPT, 2, rounds, 1), f"prefill {LONG_PROMPT}", shared)
    if "threads" in jobs:
        alone = contest(all_peers[:1], PROMPT, new, rounds, 1).rows[0].decode_tokens_per_second
        torch.set_num_threads(2)
        both = [ours, LlamaCppDecoder(gguf, length)]
        for job, crowd in (("two threads", 0), ("two threads, one competing process", 1)):
            with competition(crowd):
                result = contest(both, PROMPT, new, rounds, 2)
            rows += decode_rows(result, "C5", job, shared)
            own = result.rows[0].decode_tokens_per_second
            note = f"{own:.1f} against {alone:.1f} tokens/s"
            row = {"goal": "C5", "job": job, "peer": "own one thread", "ratio": own / alone, "note": note}
            rows.append({**row, **shared, "peer_bytes": ours.step_bytes})
    torch.set_num_threads(1)
    rows = [{**row, "peer_bits_per_weight": 8 * row.pop("peer_bytes") / weights} for row in rows]
    if "first-token" in jobs:
        rows.append(first_token(small, 2 if quick else 5))
    return rows, quality


def logit_error(model: Any) -> float:
    """Largest difference of the exact executor's logits from the model's own, relative to the largest of those."""
    tokens = torch.arange(100, 164)
    with torch.inference_mode():
        wanted = model(input_ids=tokens[None]).logits[0]
    found = RunnerDecoder(model, "exact").runner.extend(tokens, every=True)
    return float((found - wanted).abs().max() / wanted.abs().max())


def qualities(model: Any, dense: Any, gguf: Path, count: int) -> str:
    """Perplexity and KL from the dense model of both executors and of llama.cpp, on ``count`` windows of 512 tokens."""
    tokenizer = rarefy.load_tokenizer("demo")
    tokens = tokenize(tokenizer, open_text("demo", "evaluation").text)
    cut = windows(tokens, 512, count, bos_token(tokenizer, None))

    def runner(mode: Any) -> Logits:
        own = RunnerDecoder(model, mode).runner

        def logits(window: torch.Tensor) -> torch.Tensor:
            own.crop(0)
            return own.extend(window, every=True)

        return logits

    def llama_cpp(window: torch.Tensor) -> torch.Tensor:
        llama.reset()
        llama.eval(window.tolist())
        return torch.from_numpy(llama.scores[: len(window)].copy())

    import llama_cpp as library

    llama = library.Llama(str(gguf), n_ctx=512, n_batch=512, logits_all=True, verbose=False)
    others = {"exact": runner("exact"), "fast": runner("fast"), "llama.cpp": llama_cpp}
    scorer, sums, predicted = Scorer(), {name: [0.0, 0.0] for name in (*others, "dense")}, 0
    for window in cut:
        with torch.inference_mode():
            wanted = dense(input_ids=window[None]).logits[0, :-1]
        predicted += len(window) - 1
        sums["dense"][0] += float(scorer.score(wanted, window[1:]).nll.sum())
        for name, logits in others.items():
            scores = scorer.score(logits(window)[:-1], window[1:], wanted)
            assert scores.kl is not None
            sums[name][0] += float(scores.nll.sum())
            sums[name][1] += float(scores.kl.sum())
    found = {name: (float(torch.tensor(nll / predicted).exp()), kl / predicted) for name, (nll, kl) in sums.items()}
    parts = [f"{name} {perplexity:.3f} (KL {kl:.4f})" for name, (perplexity, kl) in found.items()]
    return f"perplexity of {predicted} tokens: " + ", ".join(parts)


def first_token(small: Path, rounds: int) -> Row:
    """Seconds from the start of a process to the first token, against those of the imports alone."""
    chat = [sys.executable, "-m", "rarefy", "chat", str(small), "--prompt", "Hi", "--max-new-tokens", "1"]
    commands = {"chat": [*chat, "--device", "cpu"], "imports": [sys.executable, "-c", IMPORTS]}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if turn:
                taken[name].append(time.perf_counter() - start)
    ours, imports = (statistics.median(taken[name]) for name in ("chat", "imports"))
    note = f"{ours:.2f} s from process start to the end of one token, imports alone {imports:.2f} s"
    return {"goal": "first token", "job": "rarefy chat", "peer": IMPORTS, "ratio": imports / ours, "note": note}


@contextmanager
def competition(count: int) -> Iterator[None]:
    """``count`` processes that keep a processor busy."""
    crowd = [multiprocessing.get_context("spawn").Process(target=_busy, daemon=True) for _ in range(count)]
    for one in crowd:
        one.start()
    try:
        if crowd:
            time.sleep(2.0)
        yield
    finally:
        for one in crowd:
            one.terminate()
            one.join()


def _busy() -> None:
    while True:
        pass


if __name__ == "__main__":
    main()
