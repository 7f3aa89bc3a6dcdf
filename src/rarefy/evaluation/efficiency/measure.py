"""One model and its cache under one load: the six metrics of EfficientLLM (2505.13840) with definitions that hold.

Memory: mean and peak bytes, and their mean share of the device. Compute: operations done over those that the device
could have done in that time. Latency: seconds to the first token and of each further one. Throughput: tokens and
requests a second. Energy: joules of a new token. Compression: dense bytes / stored bytes, and that times the quality
kept. Beside these the fraction of the roofline that prefill and decode reach.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from rarefy.core.config import StrictModel
from rarefy.evaluation.efficiency.probe import Energy, MemoryUse, Probe
from rarefy.evaluation.efficiency.roof import Roof, wait
from rarefy.evaluation.forward import CacheFactory, cache_bytes, new_cache, step


class Load(StrictModel):
    """``batch`` sequences of ``prompt_tokens`` random tokens, each continued greedily by ``new_tokens``; ``rounds``
    timed rounds after ``warm`` others."""

    batch: int = Field(default=1, ge=1)
    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=32, ge=2)
    rounds: int = Field(default=5, ge=1)
    warm: int = Field(default=1, ge=0)

    def describe(self) -> str:
        """One line for tables."""
        return f"batch {self.batch}, {self.prompt_tokens} + {self.new_tokens} tokens"


class Latency(StrictModel):
    """Seconds: median, 95th percentile and mean."""

    p50: float
    p95: float
    mean: float


class Cost(StrictModel):
    """What ``load`` cost. ``weight_bytes``: of the loaded model; ``cache_bytes``: of the full cache of the batch.

    ``compute_utilization``: operations of all linear layers and attention over what the roof allows in the same time;
    ``prefill_roofline`` and ``decode_roofline``: least time by bytes and operations / time taken. These are None for
    models with stacked experts, of which a token uses some only.
    """

    load: Load
    threads: int
    dtype: str
    device: str
    weight_bytes: int
    cache_bytes: int
    memory: MemoryUse
    compute_utilization: float | None
    prefill_roofline: float | None
    decode_roofline: float | None
    first_token: Latency
    token: Latency
    prompt_tokens_per_second: float
    new_tokens_per_second: float
    requests_per_second: float
    energy: Energy | None
    joules_per_token: float | None


class Work(StrictModel):
    """What one token takes: ``flops`` of linear layers, ``head_flops`` of the output head, ``attention_flops`` for each
    position that it attends to, and ``read_bytes`` of weights in one step."""

    flops: float
    head_flops: float
    attention_flops: float
    read_bytes: int


@torch.inference_mode()
def measure_cost(
    model: Any, load: Load, roof: Roof, *, cache: CacheFactory | None = None, watts: float | None = None
) -> Cost:
    """Run ``load`` on ``model``, random tokens, with the cache that ``cache`` makes; ``watts``: a stated power for
    modelled energy."""
    device: torch.device = model.device
    draw = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    prompt = torch.randint(0, vocab, (load.batch, load.prompt_tokens), generator=draw).to(device)
    for _ in range(load.warm):
        _round(model, cache, prompt, load.new_tokens)
    first: list[float] = []
    steps: list[float] = []
    kept = 0
    with Probe(device, watts) as probe:
        for _ in range(load.rounds):
            begin, times, past = _round(model, cache, prompt, load.new_tokens)
            first.append(begin)
            steps += times
            kept = cache_bytes(past)
            del past
    new = load.batch * load.new_tokens * load.rounds
    energy = probe.energy()
    utilization, prefill, decode = _fractions(work_of(model), load, roof, kept, first, steps)
    return Cost(
        load=load, threads=torch.get_num_threads(), dtype=str(model.dtype).removeprefix("torch."), device=str(device),
        weight_bytes=weight_bytes(model), cache_bytes=kept, memory=probe.memory(), compute_utilization=utilization,
        prefill_roofline=prefill, decode_roofline=decode, first_token=_latency(first), token=_latency(steps),
        prompt_tokens_per_second=load.batch * load.prompt_tokens * load.rounds / sum(first),
        new_tokens_per_second=load.batch * len(steps) / sum(steps),
        requests_per_second=load.batch * load.rounds / (sum(first) + sum(steps)), energy=energy,
        joules_per_token=None if energy is None else energy.joules / new,
    )  # fmt: skip


def weight_bytes(model: nn.Module) -> int:
    """Bytes of every parameter and buffer, shared ones once."""
    return sum(_storages(model).values())


def work_of(model: Any) -> Work | None:
    """What a token of ``model`` takes; None where stacked experts make that depend on the token."""
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        return None
    head = model.get_output_embeddings()
    table = model.get_input_embeddings()
    linear = {id(module): module for module in model.modules() if isinstance(module, nn.Linear)}
    head_flops = 2.0 * head.in_features * head.out_features if isinstance(head, nn.Linear) else 0.0
    flops = sum(2.0 * each.in_features * each.out_features for each in linear.values()) - head_flops
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tied = head is not None and bool(_storages(head).keys() & _storages(table).keys())
    # A step looks up a few rows of the table of input embeddings, and reads all of it only where it is the head too.
    unread = 0 if tied else weight_bytes(table)
    return Work(
        flops=flops, head_flops=head_flops, attention_flops=4.0 * width * config.num_hidden_layers,
        read_bytes=weight_bytes(model) - unread,
    )  # fmt: skip


def _storages(model: nn.Module) -> dict[int, int]:
    """Bytes of every parameter and buffer by their address."""
    return {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}


def _round(
    model: Any, cache: CacheFactory | None, prompt: torch.Tensor, new_tokens: int
) -> tuple[float, list[float], Any]:
    """Seconds to the first token, those of every further one, and the cache as it ends."""
    past = new_cache(model, cache)
    moments = []
    tokens = prompt
    wait(prompt.device)
    moments.append(time.perf_counter())
    for _ in range(new_tokens):
        tokens = step(model, tokens, past, last=1)[:, -1].argmax(-1, keepdim=True)
        wait(prompt.device)
        moments.append(time.perf_counter())
    first, *others = [after - before for before, after in itertools.pairwise(moments)]
    return first, others, past


def _fractions(
    work: Work | None, load: Load, roof: Roof, kept: int, first: Sequence[float], steps: Sequence[float]
) -> tuple[float | None, float | None, float | None]:
    """Compute utilization, and the fractions of the roofline of prefill and decode."""
    if work is None:
        return None, None, None
    prompt, new = load.prompt_tokens, load.new_tokens
    # A token attends to those before it and to itself: half of the square, and ever longer rows while decoding.
    prefill = load.batch * (prompt * work.flops + work.head_flops + work.attention_flops * prompt * (prompt + 1) / 2)
    mean_past = prompt + new / 2
    decode = load.batch * (work.flops + work.head_flops + work.attention_flops * mean_past)
    read = work.read_bytes + kept * mean_past / (prompt + new)
    done = load.rounds * (prefill + (new - 1) * decode)
    return (
        done / (sum(first) + sum(steps)) / roof.flops_per_second,
        roof.seconds(work.read_bytes, prefill) / float(np.mean(first)),
        roof.seconds(read, decode) / float(np.mean(steps)),
    )


def _latency(seconds: Sequence[float]) -> Latency:
    p50, p95 = np.percentile(seconds, [50, 95])
    return Latency(p50=float(p50), p95=float(p95), mean=float(np.mean(seconds)))
