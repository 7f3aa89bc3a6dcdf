"""What calibrated compression costs: seconds in all and by block, peak memory of the host and of the GPU.

Every job runs in processes of its own, so that the peaks are its own. ``demo`` is the real model on real text. ``7b``
has the shape of Llama-2-7B: weights drawn at random and written block by block, since time and memory depend on shapes
(of SpQR's outliers, on a normal distribution of weights). With ``--processes 1 2`` a job also runs under torchrun, and
``ratio`` is the time of one process over that of several.

With ``--durable`` a job keeps finished blocks and activations on disk, and goes on where it was when the same command
runs again with the same ``--work-dir``; without it only finished jobs and random models are kept there. Seconds are
those of all attempts, without what an attempt lost at its end. The first block of an attempt carries loading and
warming up, so ``seconds_per_block`` is the median without the very first.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import Row, arguments, write
from plans import PERCENT, Plan, as_published, chosen, float_code, groups, integers, spared, tables

import rarefy
from rarefy.calibration.journal import Journal
from rarefy.core.memory import peak_bytes
from rarefy.sources.models import open_model

KEY = ("model", "layers", "job", "calibration", "processes", "device_type")
PLANS = [
    integers("gptq", 4, 128), Plan("spqr int3", "spqr", {"num_bits": 3}), integers("rtn", 4, 128),
    as_published("spqr int3", num_bits=3), tables(3), tables(3, "0.45%", **PERCENT),
    tables(3, "equal", importance="equal"), spared("gradient"), float_code("nf4", 32, "gptq", 2), groups(0.5),
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A Llama's widths."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int


SHAPES = {"7b": Shape(4096, 11008, 32, 32, 32000), "160m": Shape(768, 2048, 12, 12, 32000)}


def random_llama(folder: Path, shape: Shape, layers: int) -> Path:
    """A Llama of random bfloat16 weights (normal, 0.02) in ``folder``, one file per block, made now unless it is there.

    Blocks are drawn where there is a GPU, for a CPU takes a minute per billion weights.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    done = folder / "model.safetensors.index.json"
    if done.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        tensor = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return tensor.normal_(0, 0.02, generator=generator).cpu()

    hidden, wide = shape.hidden, shape.intermediate
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    sizes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    sizes |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    places: dict[str, str] = {}
    for layer in range(-1, layers):
        if layer < 0:
            tensors = {"model.norm.weight": ones}
            tensors |= {f"{name}.weight": draw(shape.vocabulary, hidden) for name in ("model.embed_tokens", "lm_head")}
        else:
            lead = f"model.layers.{layer}"
            tensors = {f"{lead}.{name}.weight": draw(*size) for name, size in sizes.items()}
            tensors |= {f"{lead}.{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
        file = f"model-{layer + 2:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads, vocab_size=shape.vocabulary, max_position_embeddings=4096,
        tie_word_embeddings=False, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    done.write_text(json.dumps({"metadata": {}, "weight_map": places}), "utf-8")
    return folder


def child(job: dict[str, Any]) -> None:
    """One process of a job: compress, and write down what it took."""
    place = Path(job["place"])
    data: Any = "demo"
    if job["vocabulary"]:
        generator = torch.Generator().manual_seed(0)
        data = torch.randint(job["vocabulary"], (job["samples"], job["seq_len"]), generator=generator)
    if int(os.environ.get("RANK", "0")) == 0:
        _stamp(place, "start")
        _stamp_blocks(place)
    report = rarefy.compress(
        job["model"], job["recipe"], options=job["options"], out=place / "out", data=None if job["data_free"] else data,
        samples=job["samples"], seq_len=job["seq_len"], device=job["device"],
        work_dir=place / "work" if job["durable"] else None,
    )  # fmt: skip
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    found = {
        "bits_per_weight": report.bits_per_weight["total"], "host": peak_bytes(),
        "gpu": torch.cuda.max_memory_allocated() if job["device"] == "cuda" else None,
        "threads": torch.get_num_threads(), "fallbacks": len(report.fallbacks),
    }  # fmt: skip
    if rank == 0:
        _stamp(place, "end")
    (place / f"rank-{rank}.json").write_text(json.dumps(found), "utf-8")


def _stamp(place: Path, event: str) -> None:
    with (place / "times").open("a", encoding="ascii") as stream:
        stream.write(f"{event} {time.time():.3f}\n")


def _stamp_blocks(place: Path) -> None:
    """Note when the driver declares a block finished, which it does once for each."""
    advance = Journal.advance

    def stamped(journal: Journal, *given: Any, **named: Any) -> None:
        advance(journal, *given, **named)
        _stamp(place, "block")

    Journal.advance = stamped  # type: ignore[method-assign]


def run(place: Path, job: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """Run a job, or go on with it, and return what its processes wrote down, the first rank's first."""
    place.mkdir(parents=True, exist_ok=True)
    records = [place / f"rank-{rank}.json" for rank in range(processes)]
    if not all(record.is_file() for record in records):
        shutil.rmtree(place / "out", ignore_errors=True)
        (place / "job.json").write_text(json.dumps({**job, "place": str(place)}), "utf-8")
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run([*command, __file__, "--child", str(place / "job.json")], check=False)
        if done.returncode:
            raise SystemExit(f"The job in '{place}' ended with code {done.returncode}.")
        shutil.rmtree(place / "out", ignore_errors=True)
    return [json.loads(record.read_text("utf-8")) for record in records]


def block_seconds(place: Path) -> tuple[list[float], float]:
    """Seconds of each block in order, and of the whole job."""
    spans, last = [], 0.0
    for line in (place / "times").read_text("ascii").splitlines():
        event, moment = line.split()
        if event != "start":
            spans.append(float(moment) - last)
        last = float(moment)
    return spans[:-1], sum(spans)


def measure(plan: Plan, processes: int, subject: tuple[str, str, int, int], options: Namespace, work: Path) -> Row:
    name, model, layers, vocabulary = subject
    calibration = f"{options.samples} x {options.seq_len} tokens"
    job = {
        "model": model, "vocabulary": vocabulary, "recipe": plan.recipe, "options": plan.options,
        "samples": options.samples, "seq_len": options.seq_len, "device": options.device,
        "data_free": not plan.calibrates, "durable": options.durable,
    }  # fmt: skip
    place = work / "-".join([Path(model).name, plan.job.replace(" ", "_"), str(processes)])
    found = run(place, job, processes)
    spans, seconds = block_seconds(place)
    steady = statistics.median(spans[1:]) if len(spans) > 1 else None
    gpu = [one["gpu"] for one in found if one["gpu"] is not None]
    return {
        "model": name, "layers": layers, "job": plan.job, "processes": processes, "device_type": options.device,
        "calibration": None if job["data_free"] else calibration, "threads": found[0]["threads"],
        "bits_per_weight": round(found[0]["bits_per_weight"], 4), "fallbacks": found[0]["fallbacks"],
        "seconds": round(seconds, 1), "seconds_per_block": steady and round(steady, 2),
        "blocks": [round(span, 2) for span in spans], "peak_host_bytes": sum(one["host"] for one in found),
        "peak_gpu_bytes": max(gpu) if gpu else None,
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="demo", choices=["demo", *SHAPES])
    parser.add_argument("--layers", type=int, help="blocks of a random model (default: all it should have)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="1 first, to have its time for the ratio")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--only", default="^(gptq|spqr) int[34]( g128 Z)?$", help="regular expression of the jobs to measure"
    )
    parser.add_argument(
        "--work-dir", type=Path, help="keep models and unfinished jobs here, to go on after an interruption"
    )
    parser.add_argument("--durable", action="store_true", help="keep finished blocks of unfinished jobs as well")
    parser.add_argument("--child", type=Path, help="(for its own use) run the job in this file")
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child.read_text("utf-8")))
        return
    if options.quick:
        options.samples = min(options.samples, 16)
    with TemporaryDirectory() as scratch:
        work = (options.work_dir or Path(scratch)).resolve()
        shape = SHAPES.get(options.model)
        if shape is None:
            folder = open_model(options.model).folder
            layers = int(json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"])
            subject = ("SmolLM2-135M-Instruct", str(folder), layers, 0)
        else:
            layers = options.layers or (4 if options.quick else shape.layers)
            start = time.perf_counter()
            folder = random_llama(work / f"{options.model}-{layers}", shape, layers)
            print(f"model written or found in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            subject = (f"random Llama of shape {options.model}", str(folder), layers, shape.vocabulary)
        for plan in chosen(PLANS, options.only):
            alone = None
            for processes in options.processes if plan.calibrates else [1]:
                row = measure(plan, processes, subject, options, work)
                alone = row["seconds"] if processes == 1 else alone
                if alone is not None and processes > 1:
                    row["ratio"] = round(alone / row["seconds"], 2)
                print(json.dumps(row), file=sys.stderr)
                write(options, [row], KEY)


if __name__ == "__main__":
    main()
