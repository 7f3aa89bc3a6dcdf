"""What rows of ``attention_accuracy.py`` are made of: a model, its texts, plans by name, and how each is measured."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import Row, write
from torch import Tensor

import rarefy
from rarefy.attention.call import Call
from rarefy.evaluation.attention import examine
from rarefy.evaluation.bootstrap import mean_interval
from rarefy.evaluation.forward import step
from rarefy.evaluation.long.material import Material
from rarefy.evaluation.long.suite import TASKS
from rarefy.evaluation.protocol import bos_token
from rarefy.evaluation.scoring import Scorer
from rarefy.integrations.transformers.kv_setup import KvSetup, kv_recipe
from rarefy.integrations.transformers.listening import listen
from rarefy.integrations.transformers.plan_fitting import find_attention
from rarefy.integrations.transformers.plan_setup import AttentionSetup, install_, prepared, shape_of, uninstall_
from rarefy.sources.texts import open_text
from rarefy.sources.windows import tokenize
from rarefy.sources.windows import windows as cut

KEY = ("model", "kind", "context", "job", "matched", "task", "phase")
# The same for all plans of 64 x 64 blocks, so that equal nominal densities are equal measured ones.
COMMON = {"sink": 1, "local": 2, "dense_below": 0, "max_density": 1.0, "phases": "both"}
PREFILL = {
    "oracle": {},
    "oracle by greatest": {"reduce": "max"},
    "seer_attention": {"last_rows": 0},
    "seer_attention, 16 queries a block": {"last_rows": 0, "block_q": 16},
    "untrained gate": {"last_rows": 0},
    "infllm_v2": {},
    "infllm_v2 without coarse windows": {"coarse": False},
    "means of 64 keys": {"size": 64, "stride": 64, "coarse": False},
    "sparge": {"similarity": -1.0},
    "xattention": {"block_q": 64, "block_k": 64},
    "sink_local": {},
    "random": {},
}
IDS = {
    "oracle by greatest": "oracle",
    "seer_attention, 16 queries a block": "seer_attention",
    "infllm_v2 without coarse windows": "infllm_v2",
    "means of 64 keys": "infllm_v2",
    "untrained gate": "seer_attention",
}
DECODED = 64  # tokens that are decoded one by one
LEAD = 16  # tokens before the first answer that are decoded too: the question itself looks for it
Setups = dict[str, tuple[AttentionSetup | None, dict[str, Any]]]


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Say what failed, and go on: whatever one plan raises, the others must still be measured."""
    try:
        yield
    except Exception as failure:
        print(f"FAILED {what}: {type(failure).__name__}: {failure}", flush=True)


class Bench:
    """One model on one device, with what all rows have in common."""

    def __init__(self, options: Any):
        self.options, self.begun = options, time.monotonic()
        device = torch.device(options.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model: Any = rarefy.load(options.model, dtype=dtype).to(device).eval()
        self.tokenizer = rarefy.load_tokenizer(options.model)
        self.name = options.name or Path(str(options.model)).name
        self.context = options.context
        self.dtype = str(dtype).removeprefix("torch.")
        self.params: Any = None
        self.untrained: Any = None
        self.scorer = Scorer()
        self.texts = [open_text(text, "evaluation") for text in options.text]
        bos = bos_token(self.tokenizer, None)
        parts = [cut(tokenize(self.tokenizer, text.text), self.context, options.windows, bos) for text in self.texts]
        self.windows = torch.cat(parts)[: options.windows * len(parts)]

    def left(self) -> float:
        """Seconds before no new job is begun."""
        return float(self.options.seconds) - (time.monotonic() - self.begun)

    def row(self, kind: str, job: str, **facts: Any) -> None:
        """Keep a row at once, so that nothing is lost when time runs out."""
        texts = ", ".join(text.name for text in self.texts)
        row: Row = {
            "goal": "A8", "job": job, "kind": kind, "model": self.name, "context": self.context, "dtype": self.dtype,
            "windows": len(self.windows), "text": texts, "matched": None, "task": None, "phase": "prefill", **facts,
        }  # fmt: skip
        write(self.options, [row], KEY)
        shown = {name: round(value, 4) for name, value in facts.items() if isinstance(value, float)}
        print(f"{time.monotonic() - self.begun:6.1f} s  {kind:9} {job:40} {shown}", flush=True)

    def attempt(self, what: str, job: Callable[[], None]) -> None:
        """Run a job unless time is over; a failure of one leaves the others alone."""
        if self.left() <= 0:
            print(f"no time left for {what}", flush=True)
            return
        with tolerated(what):
            job()

    def setup(self, name: str, **own: Any) -> AttentionSetup:
        """The plan ``name`` with the options that all have."""
        method = IDS.get(name, name)
        given = {**COMMON, "executor": self.options.executor, **PREFILL.get(name, {}), **own}
        params = self.untrained if name == "untrained gate" else self.params if method == "seer_attention" else None
        data = {"data": self.options.train_text, "samples": 4, "seq_len": self.context}
        return find_attention(
            self.model, method, params=params, options=given, tokenizer=self.tokenizer, seed=0, **data
        )

    @contextmanager
    def using(self, setup: AttentionSetup | None) -> Iterator[None]:
        """The model attends by ``setup`` within, densely without one."""
        if setup is not None:
            setup.report.clear()
            install_(self.model, setup)
        try:
            yield
        finally:
            uninstall_(self.model)

    # What rows are made of.

    def choice(self, job: str, setup: AttentionSetup, **facts: Any) -> None:
        modules = prepared(self.model)
        plans = {
            layer: setup.plan(shape_of(module, self.model, len(modules)), self.model.device)
            for layer, module in modules.items()
        }
        found: list[Tensor] = []

        def hear(call: Call) -> None:
            plan = plans[call.layer]
            choice = examine(plan, call, first=self.context // plan.block_q // 2)
            numbers = [choice.density, choice.recall, choice.best, choice.error]
            found.append(torch.stack([number.mean() for number in numbers]).cpu())

        for window in self.windows[: self.options.looked]:
            listen(self.model, window[None], hear)
        density, recall, best, error = torch.stack(found).mean(0).tolist()
        self.row("choice", job, density=density, recall=recall, best=best, error=error, **facts)

    @torch.inference_mode()
    def logits(self, window: Tensor) -> Tensor:
        """Logits of the second half of a window, float as the model's, ``[T / 2, V]``."""
        body = self.model.base_model(input_ids=window[None].to(self.model.device), use_cache=False)
        hidden: Tensor = body.last_hidden_state[0, self.context // 2 - 1 : -1]
        return self.model.get_output_embeddings()(hidden)

    @torch.inference_mode()
    def decoded(self, window: Tensor) -> Tensor:
        """Logits of the last tokens of a window, decoded one by one."""
        cache = KvSetup("identity", kv_recipe("identity", {}))(self.model)
        tokens = window[None].to(self.model.device)
        step(self.model, tokens[:, : -DECODED - 1], cache, last=1)
        parts = [step(self.model, tokens[:, at : at + 1], cache) for at in range(-DECODED - 1, -1)]
        return torch.cat(parts, 1)[0]

    def losses(self, kind: str, setups: Setups) -> None:
        """Rows of all ``setups``: loss against the dense model's, and KL; window by window, so that the dense model
        runs once."""
        run = self.logits if kind == "prefill" else self.decoded
        windows = self.windows if kind == "prefill" else self.windows[: self.options.decoded]
        gaps: dict[str, list[float]] = {name: [] for name in setups}
        sums = {name: torch.zeros(3, dtype=torch.float64) for name in setups}
        densities: dict[str, list[float]] = {name: [] for name in setups}
        dense_nll, tokens = 0.0, 0
        for window in windows:
            if self.left() <= 0:
                break
            with self.using(None):
                dense = run(window)
            targets = window[-len(dense) :]
            reference = self.scorer.score(dense, targets).nll
            dense_nll, tokens = dense_nll + float(reference.sum()), tokens + len(targets)
            for name, (setup, _) in setups.items():
                if self.left() <= 0:
                    break
                with tolerated(f"{kind} {name}"):
                    with self.using(setup):
                        scores = self.scorer.score(run(window), targets, dense)
                    assert scores.kl is not None and scores.agree is not None and setup is not None
                    gaps[name].append(float((scores.nll - reference).mean()))
                    own = [float(scores.kl.sum()), float(scores.agree.sum()), len(targets)]
                    sums[name] += torch.tensor(own, dtype=torch.float64)
                    densities[name].append(setup.report.density())
        for name, (_, facts) in setups.items():
            if not gaps[name]:
                continue
            gap, mean = mean_interval(gaps[name]), sum(gaps[name]) / len(gaps[name])
            kl, agree = (sums[name][:2] / sums[name][2]).tolist()
            self.row(
                kind, name, density=sum(densities[name]) / len(densities[name]), dense_nll=dense_nll / tokens, gap=mean,
                gap_low=None if gap is None else gap.low, gap_high=None if gap is None else gap.high,
                perplexity_cost=float(torch.tensor(mean).expm1()), kl=kl, top1_agreement=agree,
                tokens=int(sums[name][2]), phase=kind, **facts,
            )  # fmt: skip

    def retrieval(self, phase: str, setups: Setups, tasks: Sequence[str], sessions: int) -> None:
        """Rows of answers that are right, by task: of every session all questions, one after another."""
        material = Material(self.tokenizer, self.texts[0].text)
        for task in tasks:
            asked = [self.session(material, task, f"{task} {n}", self.context) for n in range(sessions)]
            for name, (setup, facts) in setups.items():
                if self.left() <= 0:
                    return
                right: list[bool] = []
                density = []
                for tokens, answers in asked:
                    with self.using(setup):
                        right += self.answers(tokens, answers, phase)
                    density.append(1.0 if setup is None else setup.report.density())
                self.row(
                    "retrieval", name, task=task, phase=phase, accuracy=sum(right) / len(right), answers=len(right),
                    density=sum(density) / len(density), **facts,
                )  # fmt: skip

    def session(self, material: Material, task: str, seed: str, length: int) -> tuple[Tensor, list[tuple[int, int]]]:
        """At most ``length`` tokens: a context with all of its questions and answers, and where each answer lies."""
        session = TASKS[task](material, length - 256, random.Random(seed))
        parts, answers = [tokenize(self.tokenizer, session.context)], []
        for turn in session.turns:
            begin = sum(len(part) for part in parts)
            prompt, answer = (tokenize(self.tokenizer, text) for text in (turn.prompt, turn.answer))
            answers.append((begin + len(prompt), begin + len(prompt) + len(answer)))
            parts += [prompt, answer]
        return torch.cat(parts), answers

    @torch.inference_mode()
    def answers(self, tokens: Tensor, answers: list[tuple[int, int]], phase: str) -> list[bool]:
        """Whether every token of an answer is the most probable one after those before it."""
        given = tokens[None].to(self.model.device)
        first = answers[0][0] - LEAD
        if phase == "prefill":
            body = self.model.base_model(input_ids=given, use_cache=False)
            logits = self.model.get_output_embeddings()(body.last_hidden_state[0, first:-1])
        else:
            cache = KvSetup("identity", kv_recipe("identity", {}))(self.model)
            step(self.model, given[:, :first], cache, last=1)
            parts = [step(self.model, given[:, at : at + 1], cache)[0] for at in range(first, given.shape[1] - 1)]
            logits = torch.cat(parts)
        said = logits.argmax(-1).cpu()
        return [bool((said[low - first - 1 : high - first - 1] == tokens[low:high]).all()) for low, high in answers]
