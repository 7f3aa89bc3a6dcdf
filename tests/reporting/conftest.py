"""Findings of every kind, as commands write them, and a real browser."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rarefy.calibration.report import CompressionReport, LayerReport
from rarefy.core.environment import Environment, Run
from rarefy.evaluation.bootstrap import Interval
from rarefy.evaluation.caches import CacheComparison, CacheEvaluation, CacheProtocol
from rarefy.evaluation.efficiency.matrix import Efficiency, Row
from rarefy.evaluation.efficiency.measure import Cost, Latency, Load
from rarefy.evaluation.efficiency.probe import Energy, MemoryUse
from rarefy.evaluation.efficiency.roof import Roof
from rarefy.evaluation.long.position import position_curve
from rarefy.evaluation.long.results import Answer, LongComparison, LongEvaluation, Stages
from rarefy.evaluation.long.suite import LongProtocol
from rarefy.evaluation.protocol import Protocol
from rarefy.evaluation.results import Comparison, Evaluation, LayerDifference, ModelDifference
from rarefy.evaluation.tasks.results import TaskComparison, TaskEvaluation, TaskScore
from rarefy.reporting.benchmarks import Benchmark
from rarefy.reporting.findings import Findings

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
PROTOCOL = Protocol(context=512, windows=8, bos=False, dtype="float32", text="Wikipedia sample", form="documents")


def evaluation(name: str, bits: float, perplexity: float, kl: float | None, **changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "model": name, "perplexity": perplexity, "nll": 2.8, "kl": kl, "tokens": 4088, "protocol": PROTOCOL,
        "top1_agreement": None if kl is None else max(0.0, 1 - kl), "stored_bytes": int(bits * 17e6),
        "bits_per_weight": {"total": bits, "codes": bits}, "dense_bytes": 538_000_000, "seconds": 9.0,
        "tokens_per_second": 450.0 + 10 * bits, "peak_bytes": 2_100_000_000,
    }  # fmt: skip
    return Evaluation(**{**values, **changes})


def compression(name: str, bits: float, error: float, blocks: int = 12) -> CompressionReport:
    dice = random.Random(name)
    layers = tuple(
        LayerReport(
            name=f"model.layers.{block}.{kind}", method="rtn", shape=(576, 576), seconds=0.1,
            bits_per_weight=bits + (block == 0), relative_error=error * dice.uniform(0.8, 1.2),
            notes=("rounded to nearest",) if (block, kind) == (3, "mlp.up_proj") else (),
        )
        for block in range(blocks)
        for kind in KINDS
    )  # fmt: skip
    return CompressionReport(
        model="SmolLM2-135M-Instruct", recipe="rtn", out=f"models/{name}", bits_per_weight={"total": bits, "codes": 4},
        weights=10**8, stored_bytes=10**8, dense_bytes=5 * 10**8, seconds=7.5, peak_bytes=10**9, layers=layers,
        skipped={"lm_head": "output head"}, fallbacks=("model.layers.3.mlp.up_proj: rounded to nearest",), notes=(),
    )  # fmt: skip


def score(task: str, value: float, gap: float | None) -> TaskScore:
    between = None if gap is None else Interval(value=gap, low=gap - 0.03, high=gap + 0.04)
    return TaskScore(task=task, version="1.0", metric="acc", value=value, examples=100, difference=between)


def tasks(name: str, gap: float | None) -> TaskEvaluation:
    scores = tuple(score(task, 0.6 + (gap or 0), gap) for task in ("piqa", "arc_easy"))
    return TaskEvaluation(
        model=name, scores=scores, limit=100, few_shot=None, data="piqa.jsonl", dtype="float32", bits_per_weight=None,
        stored_bytes=None, dense_bytes=None, seconds=60.0,
    )  # fmt: skip


def long(name: str, worse: float, reference: bool = False) -> LongEvaluation:
    answers = tuple(
        Answer(
            task=task, session=f"{length}-{index}", mode=mode, turn=turn, length=length - 30, depth=0.1 + 0.4 * turn,
            tokens=5, nll=1 + turn + worse, exact=turn == 0, kl=None if reference else worse / 2,
            top1_agreement=None if reference else 0.9,
        )
        for task in ("needle", "kv")
        for length in ((512, 2048) if task == "needle" else (2048,))
        for index in range(2)
        for mode in ("multi_turn", "multi_request")
        for turn in range(3)
    )  # fmt: skip
    dice = np.random.default_rng(0)
    nll = 2 + 5 / np.arange(1, 2048) ** 0.4 + 0.1 * dice.normal(size=(3, 2047)) + worse
    stages = Stages(
        tokens=9000, prefill_tokens_per_second=400.0, cache_bytes_per_token=23040, step_seconds=0.2, load_seconds=0.05
    )
    return LongEvaluation(
        model=name, answers=answers, positions=position_curve(nll, None), stages=stages, stored_bytes=None,
        protocol=LongProtocol(text="Wikipedia sample", dtype="float32"), bits_per_weight=None, dense_bytes=None,
        seconds=100.0,
    )  # fmt: skip


def row(job: str, bits: float, perplexity: float, kl: float | None, **changes: Any) -> dict[str, Any]:
    """A row as the accuracy benchmark writes it."""
    values = {
        "model": "lab", "seed": 0, "job": job, "bits_per_weight": bits, "perplexity": perplexity, "kl": kl,
        "top1_agreement": None if kl is None else 0.8, "tokens": 1000, "protocol": "context 2048, 4 windows",
        "calibration": None, "commit": "abc1234",
    }  # fmt: skip
    return {**values, **changes}


def benchmark(name: str, rows: list[dict[str, Any]]) -> Benchmark:
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    return Benchmark(name=name, device="A processor", versions=versions, commit="abc1234", rows=tuple(rows))


def caches(*found: tuple[str, float, float]) -> CacheComparison:
    """Caches by name, bits and KL."""
    evaluated = [
        CacheEvaluation(
            name=name, nll=2 + kl, kl=kl, top1_agreement=0.9, gap=Interval(value=kl, low=kl / 2, high=2 * kl),
            versus_first=None, bits={"total": bits}, shared_bytes=2000, seconds=3,
        )
        for name, bits, kl in found
    ]  # fmt: skip
    protocol = CacheProtocol(context=512, windows=4, dtype="float32", text="a text")
    return CacheComparison(
        model="SmolLM2", protocol=protocol, dense_nll=2, dense_seconds=1, tokens=2000, caches=evaluated
    )


def efficiency(*models: tuple[str, float, float]) -> Efficiency:
    """Rows of name, milliseconds a token, and perplexity."""
    memory = MemoryUse(
        mean_bytes=9e8, peak_bytes=10**9, capacity_bytes=8 * 10**9,
        timeline=tuple((0.1 * step, int(9e8 + 1e7 * step)) for step in range(11)),
    )  # fmt: skip
    rows = []
    for name, milliseconds, perplexity in models:
        token = Latency(p50=milliseconds / 1e3, p95=2 * milliseconds / 1e3, mean=milliseconds / 1e3)
        cost = Cost(
            load=Load(), threads=2, dtype="float32", device="cpu", weight_bytes=10**8, cache_bytes=10**6, memory=memory,
            compute_utilization=0.2, prefill_roofline=0.5, decode_roofline=None, first_token=token, token=token,
            prompt_tokens_per_second=100, new_tokens_per_second=1e3 / milliseconds, requests_per_second=1,
            energy=Energy(joules=10, watts=5, source="modelled"), joules_per_token=0.0625,
        )  # fmt: skip
        rows.append(
            Row(
                model=name, cache="dense", cost=cost, bits_per_weight=None, compression_ratio=4, perplexity=perplexity,
                kl=None, quality_kept=20 / perplexity,
            )
        )
    roof = Roof(bytes_per_second=1e10, flops_per_second=1e11, dtype="float32")
    return Efficiency(rows=tuple(rows), roof=roof, protocol="context 512, 4 windows")


ACCURACY = (
    row("dense", 32, 20.0, None), row("rtn int4", 4.2, 22.0, 0.2), row("rtn int4", 4.2, 24.0, 0.3, seed=1),
    row("rtn int2", 2.2, 9000.0, 8.0), row("gptq int4", 4.2, 21.0, 0.1), row("gptq int3", 3.2, 25.0, 0.5),
)  # fmt: skip
SPEED = (
    {"goal": "C2", "job": "decode", "peer": "a peer", "ratio": 1.4, "note": None},
    {"goal": "C2", "job": "decode", "peer": "another", "ratio": 0.7, "note": "slower"},
)


def run(command: str) -> Run:
    here = Environment(
        rarefy="0.1.0", python="3.11.7", platform="Linux", packages={"torch": "2.13.0", "peft": None}, gpus=(),
        processor="A processor", cores=2, threads=2, instructions="AVX512",
    )  # fmt: skip
    return Run(command=command, date="2026-01-01 00:00:00", environment=here)


@pytest.fixture
def findings() -> Findings:
    """Two compressed models and one of every other kind of result."""
    apart = tuple(
        LayerDifference(
            name=layer.name, first="integer 4 bit g64", second="integer 3 bit g64", first_bits=4.2, second_bits=3.2,
            difference=0.2,
        )
        for layer in compression("int4", 4.2, 0.1).layers
    )  # fmt: skip
    return Findings(
        comparisons=(
            Comparison(
                candidates=[
                    evaluation("int4", 4.25, 19.3, 0.22), evaluation("int3", 3.25, 61.9, 1.31),
                    evaluation("a <b>bold</b> & long/name-of-a-model-that-nobody-can-read", 4.5, 20.1, 0.25),
                ],
                reference=evaluation("SmolLM2-135M-Instruct", 32, 16.7, None), passes=1,
            ),
        ),
        compressions=(compression("int4", 4.25, 0.1), compression("int3", 3.25, 0.2)),
        tasks=(TaskComparison(candidates=[tasks("int4", -0.02), tasks("int3", -0.2)], reference=tasks("dense", None)),),
        long=(LongComparison(candidates=[long("int4", 0.1)], reference=long("dense", 0, True)),),
        caches=(caches(("fp8", 8.5, 0.001), ("kivi:num_bits=2", 3.0, 0.2)),),
        efficiency=(efficiency(("int4", 20.0, 25.0), ("int3", 15.0, 40.0)),),
        benchmarks=(benchmark("weight_accuracy", list(ACCURACY)), benchmark("speed", list(SPEED))),
        differences=(ModelDifference(first="models/int4", second="models/int3", layers=apart),),
        runs=(run("rarefy eval models/int4 models/int3 --reference demo --json"), run("rarefy report <x>")),
        notes=("dense reference = a made-up checkpoint",),
    )  # fmt: skip


class Browser:
    """Headless Chromium on a file: what the page looks like inside, what it complained of, and its picture."""

    def __init__(self, program: str, scratch: Path):
        self._program, self._scratch = program, scratch

    def open(
        self, page: Path, script: str = "", width: int = 1200, picture: Path | None = None
    ) -> tuple[str, str, dict[str, str]]:
        """The page's HTML, its console, and the data attributes of its root after its scripts and ``script`` have run.

        A window is never narrower than 500 pixels, so the page is shown in a frame of ``width``, as on a phone.
        """
        probe = (
            "<script>addEventListener('load', () => { const wait = setInterval(() => {"
            "if (document.documentElement.dataset.ready !== 'yes') return; clearInterval(wait);"
            f"const root = document.documentElement; {script};"
            "parent.postMessage([{...root.dataset}, root.outerHTML.replace(/<script>[^]*?<\\/script>/g, '')], '*');"
            "}, 20); });</script></body>"
        )
        inner = self._scratch / f"{page.stem}.html"
        inner.write_text(page.read_text("utf-8").replace("</body>", probe), "utf-8")
        outer = self._scratch / "frame.html"
        outer.write_text(
            "<!doctype html><html><head><link rel=icon href='data:,'></head><body style='margin:0'>"
            "<script>addEventListener('message', (event) => { document.getElementById('found').textContent = "
            "JSON.stringify(event.data); });</script><pre id=found hidden></pre>"
            f"<iframe src='{inner.name}' style='border:0' width={width} height=3200></iframe></body></html>"
        )
        command = [
            self._program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            f"--user-data-dir={self._scratch / 'profile'}", f"--window-size={width},3200", "--enable-logging=stderr",
            "--virtual-time-budget=20000", "--run-all-compositor-stages-before-draw", "--dump-dom",
        ]  # fmt: skip
        if picture is not None:
            command.append(f"--screenshot={picture}")
        done = subprocess.run([*command, outer.as_uri()], capture_output=True, text=True, timeout=240, check=True)
        console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line)
        found = re.search(r'<pre id="found" hidden="">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found is not None and found[1], f"the page never got ready: {console or done.stderr[-2000:]}"
        data, text = json.loads(html.unescape(found[1]))
        return text, console, data


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium, to open the page as a person would")
    return Browser(program, tmp_path_factory.mktemp("browser"))


Write = Callable[[Path, Any], Path]


@pytest.fixture
def write() -> Write:
    def one(path: Path, content: Any) -> Path:
        path.write_text(json.dumps(content))
        return path

    return one
