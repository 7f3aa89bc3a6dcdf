"""A model trained to attend sparsely (``infllm_v2``, through the backward pass over selected blocks), against the same
model trained densely for as many steps, on the same text in the same order.

Rows (``job``): the model as it was, trained densely, and trained sparsely; each attending densely and sparsely: loss on
held-out text in nats, over the second half of each window, and its difference from the densely trained dense one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Row, arguments, write
from torch import Tensor

import rarefy
from rarefy.calibration.samples import open_samples
from rarefy.evaluation.protocol import bos_token
from rarefy.sources.texts import open_text
from rarefy.sources.windows import tokenize
from rarefy.sources.windows import windows as cut

KEY = ("model", "job", "attention", "context", "density")


def loss_of(model: Any, rows: Tensor, second_half: bool = False) -> Tensor:
    """Mean loss of next tokens of ``rows [B, T]``."""
    first = rows.shape[1] // 2 if second_half else 1
    hidden = model.base_model(input_ids=rows, use_cache=False).last_hidden_state[:, first - 1 : -1]
    logits = model.get_output_embeddings()(hidden).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, first:].flatten())


def set_sparse(model: Any, options: Any, on: bool) -> Any:
    if not on:
        return rarefy.set_attention(model, None)
    return rarefy.set_attention(
        model, "infllm_v2", density=options.density, local=2, dense_below=0, max_density=1.0, phases="prefill"
    )


def train(model: Any, rows: Tensor, options: Any, sparse: bool, seconds: float, steps: int) -> tuple[int, float]:
    """AdamW over ``rows`` in order; how many steps there was time for, and how long they took."""
    set_sparse(model, options, sparse)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.0, betas=(0.9, 0.95))
    model.train()
    begin, done = time.monotonic(), 0
    for number in range(steps):
        if time.monotonic() - begin > seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1.0, (number + 1) / 10)
        optimizer.zero_grad(set_to_none=True)
        part = rows[number * options.batch % (len(rows) - options.batch + 1) :][: options.batch].to(model.device)
        loss = loss_of(model, part)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 1
        if number % 20 == 0:
            print(f"{'sparse' if sparse else 'dense'} step {number}: {float(loss):.4f}, "
                  f"{time.monotonic() - begin:.1f} s", flush=True)  # fmt: skip
    return done, time.monotonic() - begin


@torch.no_grad()
def evaluate(model: Any, windows: Tensor, options: Any, sparse: bool) -> tuple[float, float]:
    """Loss on ``windows``, and the density that was measured."""
    setup = set_sparse(model, options, sparse)
    model.eval()
    losses = [float(loss_of(model, window[None].to(model.device), True)) for window in windows]
    return sum(losses) / len(losses), 1.0 if setup is None else setup.report.density()


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--text", nargs="+", default=["demo"], help="held-out texts")
    parser.add_argument("--train-text", default="demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--seconds", type=float, default=600, help="for the sparse training")
    options = parser.parse_args(argv)
    if options.quick:
        options.context, options.steps, options.windows = min(512, options.context), 4, 1
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    tokenizer = rarefy.load_tokenizer(options.model)
    bos = bos_token(tokenizer, None)
    windows = torch.cat(
        [
            cut(tokenize(tokenizer, open_text(text, "evaluation").text), options.context, options.windows, bos)
            for text in options.text
        ]
    )
    rows: list[Row] = []
    name, trained_steps, base = Path(options.model).name, options.steps, None
    for job in ("sparse", "dense", "as it was"):
        model: Any = rarefy.load(options.model, dtype=torch.float32).to(options.device)
        seconds = 0.0
        if job != "as it was":
            count = options.steps * options.batch
            texts = open_samples(options.train_text, tokenizer, model.config, count, options.context, 0)
            given = torch.cat([batch["input_ids"] for batch in texts.batches])
            budget = options.seconds if job == "sparse" else 1e9
            trained_steps, seconds = train(model, given, options, job == "sparse", budget, trained_steps)
        for attention in ("dense", "sparse"):
            nll, density = evaluate(model, windows, options, attention == "sparse")
            print(f"trained {job}, attends {attention}: {nll:.4f} nats, density {density:.3f}", flush=True)
            rows.append({
                "goal": "A8", "model": name, "job": job, "attention": attention, "context": options.context,
                "density": options.density, "measured_density": density, "nll": nll, "tokens": windows.numel() // 2,
                "steps": 0 if job == "as it was" else trained_steps, "batch": options.batch, "rate": options.rate,
                "seconds": seconds, "text": ", ".join(Path(text).name for text in options.text),
            })  # fmt: skip
            if job == "dense" and attention == "dense":
                base = nll
        del model
    assert base is not None
    write(options, [{**row, "gap": row["nll"] - base} for row in rows], KEY)


if __name__ == "__main__":
    main()
