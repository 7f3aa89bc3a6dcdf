"""Decoding on a CPU: a compressed SmolLM2 against llama.cpp and Transformers, in one process and in turns.

Jobs: ``decode`` (goal C2) and ``prefill`` (C4, at this size) on one thread; ``two threads`` (C5) idle, and with one
process that competes for them; ``first token`` of ``rarefy chat`` from the start of its process, against importing
Torch and Transformers' Llama. Quality stands beside: perplexity of all, and KL of both executors from the dense model,
on the same windows.
llama.cpp reads the same weights, written as F16 and quantized by its own quantizer (``benchmarks/gguf_peer.py``).
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf_peer
import torch
from harness import Row, arguments, write

import rarefy
from rarefy.contracts import Recipe, Rule
from rarefy.evaluation.protocol import bos_token
from rarefy.evaluation.scoring import Scorer
from rarefy.evaluation.speed import Decoder, Speed, measure
from rarefy.integrations.peers import LlamaCppDecoder, RunnerDecoder, TransformersDecoder, step_bytes
from rarefy.sources.models import open_model
from rarefy.sources.texts import open_text
from rarefy.sources.windows import tokenize, windows

KEY = ("goal", "job", "peer")
PROMPT, NEW = 128, 64
IMPORTS = "import torch; from transformers import LlamaForCausalLM"
Logits = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--recipe", default="gptq", help="id of the weight recipe, of the layers; the head takes rtn")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--work-dir", type=Path, help="keep the compressed model and the GGUF files here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work_dir or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        small = compressed(work / f"{options.recipe}-g{options.group_size}", options.recipe, options.group_size)
        peer = llama_cpp_file(work)
        rows = measured(small, peer, options.quick)
    write(options, rows, KEY)


def compressed(folder: Path, method: str, group_size: int) -> Path:
    """The demo model with its layers and its head in 4 bits, made once."""
    if not (folder / "config.json").is_file():
        grid = {"num_bits": 4, "group_size": group_size, "clip": "mse"}
        head = Rule(targets=("lm_head",), method="rtn", options=grid)
        layers = Rule(method=method, options=grid)
        rarefy.compress("demo", Recipe(name=method, rules=(head, layers)), out=folder, seq_len=512, overwrite=True)
    return folder


def llama_cpp_file(work: Path) -> Path:
    """The demo model in Q4_0, made once."""
    out = work / "demo-q4_0.gguf"
    if not out.is_file():
        gguf_peer.write_f16(open_model("demo").folder, work / "demo-f16.gguf")
        gguf_peer.quantize(work / "demo-f16.gguf", out, "Q4_0")
    return out


def measured(small: Path, gguf: Path, quick: bool) -> list[Row]:
    rounds = 3 if quick else 9
    model: Any = rarefy.load(small)
    dense: Any = rarefy.load("demo")
    quality = qualities(model, dense, gguf, 2 if quick else 12)
    bits = 8 * step_bytes(model) / sum(p.numel() for p in dense.parameters())
    rows: list[Row] = []

    def run(goal: str, job: str, threads: int, decoders: list[Decoder]) -> list[Speed]:
        prompt = torch.randint(10, 90, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
        torch.set_num_threads(threads)
        result = measure(decoders, prompt, 16 if quick else NEW, rounds)
        ours = result.rows[0]
        for row in result.rows[1:]:
            shared = {"bits_per_weight": bits, "fraction_of_limit": ours.fraction_of_read, "peer": row.executor}
            note = (
                f"{ours.decode_tokens_per_second:.1f} against {row.decode_tokens_per_second:.1f} tokens/s, "
                f"one thread reads {result.read_bytes_per_second / 1e9:.1f} GB/s; {quality}"
            )
            rows.append({"goal": goal, "job": job, "ratio": row.decode_ratio, "note": note, **shared})
            if goal == "C2":
                note = f"{ours.prefill_tokens_per_second:.0f} against {row.prefill_tokens_per_second:.0f} tokens/s"
                prefill = {"goal": "C4", "job": f"prefill {PROMPT}", "ratio": row.prefill_ratio, "note": note}
                rows.append({**prefill, **shared})
        for row in result.rows:
            print(f"{job}: {row.executor}: {row.decode_tokens_per_second:.1f} tokens/s", file=sys.stderr)
        return list(result.rows)

    length, ours = PROMPT + NEW, RunnerDecoder(model, "fast")
    torch.set_num_threads(1)
    alone = run(
        "C2", f"decode after {PROMPT}", 1,
        [ours, LlamaCppDecoder(gguf, length), TransformersDecoder(dense, False, length),
         TransformersDecoder(dense.bfloat16(), False, length)],
    )[0]  # fmt: skip
    torch.set_num_threads(2)
    both = [ours, LlamaCppDecoder(gguf, length)]
    for job, crowd in (("two threads", 0), ("two threads, one competing process", 1)):
        with competition(crowd):
            own = run("C5", job, 2, both)[0]
        ratio = own.decode_tokens_per_second / alone.decode_tokens_per_second
        rows.append({"goal": "C5", "job": job, "peer": "own one thread", "ratio": ratio, "bits_per_weight": bits})
    torch.set_num_threads(1)
    rows.append(first_token(small, 2 if quick else 5))
    return rows


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
