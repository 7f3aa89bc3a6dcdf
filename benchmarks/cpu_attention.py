"""Prefill of a long prompt on a processor: attention by a sparse plan against torch's dense attention, and the whole.

One model reads windows of a text, dense and by each plan in turn in one process; medians. Time within the attention
function is the attention part, estimation and selection included; ``perplexity_cost`` is what the plan costs on those
windows, so a ratio is never without its price. With one thread the time is that of the processor, which what else runs
on the machine changes less.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from harness import Row, arguments, write

import rarefy
from rarefy.core.devices import fast_dtype
from rarefy.integrations.transformers import attention
from rarefy.integrations.transformers.plan_evaluation import set_plan
from rarefy.sources.texts import open_text
from rarefy.sources.windows import tokenize
from rarefy.sources.windows import windows as cut

KEY = ("job", "model", "tokens", "threads", "dtype")
PLANS = ("sparge:similarity=-1,density=1", "sparge:similarity=-1", "sparge:similarity=-1,density=0.1,block_q=128")


def now() -> float:
    """Seconds, of the processor if one thread computes."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Watch:
    """Seconds spent in rarefy's attention function, which is SDPA for a model without a plan."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        begin = now()
        found = attention.rarefy_attention(*arguments, **options)
        self.seconds += now() - begin
        return found


@torch.inference_mode()
def prefill(model: Any, tokens: torch.Tensor, watch: Watch) -> tuple[float, float, float]:
    """Seconds of attention and of the whole pass, and nats per token."""
    watch.seconds = 0.0
    begin = now()
    logits = model(input_ids=tokens, use_cache=False).logits
    whole = now() - begin
    nll = torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:])
    return watch.seconds, whole, float(nll)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="demo", help="folder, hub id, or 'demo'")
    parser.add_argument("--text", default="demo", help="a text file, or 'demo'")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--attention", action="append", help="a plan, as ID:key=value; may be repeated")
    parser.add_argument("--dtype", help="default: what this processor multiplies fastest")
    options = parser.parse_args()
    from transformers.modeling_utils import AttentionInterface

    dtype = getattr(torch, options.dtype) if options.dtype else fast_dtype(torch.device("cpu"))
    model: Any = rarefy.load(options.model, dtype=dtype)
    tokenizer = rarefy.load_tokenizer(options.model)
    count = 1 if options.quick else options.windows
    text = tokenize(tokenizer, open_text(options.text, "evaluation").text)
    windows = cut(text, options.tokens, count, None)
    watch = Watch()
    attention.register_attention()
    AttentionInterface.register(attention.NAME, watch)
    model.set_attn_implementation(attention.NAME)
    plans = ["dense", *(options.attention or PLANS)]
    found: dict[str, list[tuple[float, float, float]]] = {plan: [] for plan in plans}
    reports: dict[str, Any] = {}
    for window in windows.split(1):
        for plan in plans:
            setup = rarefy.set_attention(model, None) if plan == "dense" else set_plan(model, plan)
            found[plan].append(prefill(model, window, watch))
            if setup is not None:
                reports[plan] = setup.report
            print(plan, "attention {:.2f} s, whole {:.2f} s, {:.4f} nats".format(*found[plan][-1]), flush=True)
    dense = [statistics.median(each) for each in zip(*found["dense"], strict=True)]
    dense_nll = statistics.mean(each[2] for each in found["dense"])
    rows: list[Row] = []
    for plan in plans[1:]:
        part, whole, _ = (statistics.median(each) for each in zip(*found[plan], strict=True))
        nll = statistics.mean(each[2] for each in found[plan])
        clock = "processor" if torch.get_num_threads() == 1 else "wall"
        common = {
            "model": Path(options.model).name, "tokens": options.tokens, "threads": torch.get_num_threads(),
            "peer": "torch SDPA", "clock": clock, "density": round(reports[plan].density(), 4), "dtype": str(dtype),
            "perplexity": round(float(torch.tensor(nll).exp()), 4),
            "perplexity_cost": round(float(torch.tensor(nll - dense_nll).exp()) - 1, 5), "windows": count,
            "parts_seconds": {name: round(each, 3) for name, each in reports[plan].seconds().items()},
        }  # fmt: skip
        for goal, job, ours, theirs in (
            ("CPU attention part", "attention part of prefill", part, dense[0]),
            ("CPU prefill", "whole prefill", whole, dense[1]),
        ):
            rows.append({"goal": goal, "job": f"{job}, {plan}", "seconds": round(ours, 3), "peer_seconds":
                         round(theirs, 3), "ratio": round(theirs / ours, 3), **common})  # fmt: skip
        print(plan, f"attention {dense[0] / part:.2f}x, whole {dense[1] / whole:.2f}x, perplexity "
              f"{common['perplexity_cost']:+.2%} at density {common['density']}")  # fmt: skip
    write(options, rows, KEY)


if __name__ == "__main__":
    main()
