"""``rarefy eval``: perplexity, and distance from a dense reference; or the scores of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rarefy.cli.common import Device, Json, command, print_record, print_table
from rarefy.core.devices import check_dtype
from rarefy.core.errors import OptionError

if TYPE_CHECKING:
    from rarefy.evaluation.long.results import LongComparison
    from rarefy.evaluation.results import Comparison, Evaluation
    from rarefy.evaluation.tasks.results import TaskComparison

# What each way of measuring reads, besides what all do; anything else that was given would change nothing.
EVERYWHERE = {"models", "dtype", "device", "as_json", "kv", "attention", "chunk", "task_data"}
TEXT, CACHES = "on text", "with --kv, which holds each cache against the model's own dense one"
TASKS, LONG = "with --tasks", "with --suite long"
READS = {
    TEXT: {"reference", "data", "context", "windows", "executor"},
    CACHES: {"data", "context", "windows", "regime", "prefill"},
    TASKS: {"tasks", "reference", "limit", "few_shot", "batch", "allow_code", "work_dir"},
    LONG: {
        "suite", "tasks", "reference", "data", "length", "sessions", "documents", "seed", "session_file", "work_dir"
    },
}  # fmt: skip

WorkDir = Annotated[Path | None, typer.Option(help="Keep finished parts here, so that the same command goes on.")]


@command
def evaluate(
    context_: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Models: folders, hub ids, .gguf files or 'demo'.")],
    reference: Annotated[
        str | None, typer.Option(help="Dense model to measure KL and top-1 agreement against.")
    ] = None,
    data: Annotated[str, typer.Option(help="Text file, or 'demo'.")] = "demo",
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option(min=0, help="Number of windows; 0 takes the whole text.")] = 12,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a pass that reads the KV cache of those before; default: all.")
    ] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(help="KV cache to measure on the model, as ID or ID:key=value,key=value; may be repeated."),
    ] = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(help="Sparse attention to measure, as ID or ID:key=value,key=value; may be repeated."),
    ] = None,
    regime: Annotated[str, typer.Option(help="How --kv caches are read: chunked, decode or distorted.")] = "chunked",
    prefill: Annotated[int, typer.Option(min=0, help="Tokens before decoding starts, with --regime decode.")] = 0,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks to score instead, through lm-eval: names or YAML files, comma-separated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="First examples of each task; 0 takes all.")] = 0,
    few_shot: Annotated[int | None, typer.Option(min=0, help="Examples in the prompt; default: as the task.")] = None,
    task_data: Annotated[
        Path | None, typer.Option(envvar="RAREFY_TASK_DATA", help="Folder with the tasks' examples as local files.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="'long' asks about long contexts instead; --tasks then chooses among its tasks.")
    ] = None,
    length: Annotated[int, typer.Option(min=256, help="Tokens of a long context.")] = 2048,
    sessions: Annotated[int, typer.Option(min=1, help="Long contexts of each task.")] = 2,
    documents: Annotated[int, typer.Option(min=1, help="Texts for the likelihood by position.")] = 4,
    seed: Annotated[int, typer.Option(help="Draws the long contexts.")] = 0,
    session_file: Annotated[
        list[Path] | None, typer.Option(help="Sessions of SCBench, kvpress or RULER (.jsonl, .parquet) to ask besides.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples of a forward pass.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let tasks run what the model writes, in a sandbox.")
    ] = False,
    work_dir: WorkDir = None,
    executor: Annotated[str, typer.Option(help="exact, or fast (may quantize activations).")] = "exact",
    dtype: Annotated[str, typer.Option(help="Dtype of the forward pass: auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure models on the same text under a stated protocol, or on the same tasks."""
    if executor not in ("exact", "fast"):
        raise OptionError(f"--executor '{executor}' is unknown; use exact or fast.")
    check_dtype(dtype, "--dtype")
    chosen: Literal["exact", "fast"] = "fast" if executor == "fast" else "exact"
    from rarefy import api

    if kv and attention and regime != "chunked":
        raise OptionError(f"--attention with --kv is measured chunked, not in the regime '{regime}'; leave one out.")
    if suite not in (None, "long"):
        raise OptionError(f"--suite '{suite}' is unknown; use long.")
    way = check_read(context_)
    if way == CACHES:
        from rarefy.cli.caches import evaluate_caches

        evaluate_caches(
            models, kv or [], regime=regime, chunk=chunk or 64, prefill=prefill, data=data, context=context,
            windows=windows or None, dtype=dtype, device=device, as_json=as_json,
        )  # fmt: skip
        return
    names = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    if way == LONG:
        found = api.evaluate_long(
            models, reference=reference, data=data, length=length, sessions=sessions, documents=documents, seed=seed,
            chunk=chunk or 256, tasks=names, session_files=session_file or (), kv=kv or (), attention=attention or (),
            work_dir=work_dir, dtype=dtype, device=device,
        )  # fmt: skip
        if as_json:
            print_record("long", found.model_dump())
        else:
            print_long(found)
        return
    if names is not None:
        scores = api.evaluate_tasks(
            models, names, reference=reference, limit=limit or None, few_shot=few_shot, task_data=task_data,
            chunk=chunk or (64 if kv else None), kv=kv or (), attention=attention or (), batch=batch,
            allow_code=allow_code, work_dir=work_dir, dtype=dtype, device=device,
        )  # fmt: skip
        if as_json:
            print_record("tasks", scores.model_dump())
        else:
            print_tasks(scores)
        return
    result = api.compare(
        models, reference=reference, data=data, context=context, windows=windows or None, executor=chosen, dtype=dtype,
        device=device, chunk=chunk or (64 if kv else None), kv=kv or (), attention=attention or (),
    )  # fmt: skip
    if as_json:
        records = [_record(evaluation, result) for evaluation in result.candidates]
        print_record("evaluation", records[0] if len(records) == 1 else records)
        return
    print_comparison(result)


def check_read(context: typer.Context) -> str:
    """The way of measuring that the command line asks for. Raises OptionError for an option that it does not read."""
    given = context.params
    way = TASKS if given["tasks"] is not None else TEXT
    if given["suite"] is not None:
        way = LONG
    elif way == TEXT and given["kv"] and not given["attention"]:
        way = CACHES
    for name in context.params.keys() - EVERYWHERE - READS[way]:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise OptionError(f"--{name.replace('_', '-')} has no effect {way}; leave it out.")
    return way


def print_comparison(result: Comparison) -> None:
    """The table of a comparison, reference first, with its protocol below."""
    everyone = ([result.reference] if result.reference else []) + result.candidates
    rows = [
        (
            evaluation.model + (" (reference)" if evaluation is result.reference else ""),
            f"{evaluation.perplexity:.3f}",
            "-" if evaluation.kl is None else f"{evaluation.kl:.4f}",
            "-" if evaluation.top1_agreement is None else f"{evaluation.top1_agreement:.2%}",
            "-" if not evaluation.bits_per_weight else f"{evaluation.bits_per_weight['total']:.3f}",
            "-" if evaluation.stored_bytes is None else f"{evaluation.stored_bytes / 1e6:.1f}",
            f"{evaluation.seconds:.1f}",
            "-" if evaluation.attention_density is None else f"{evaluation.attention_density:.3f}",
        )
        for evaluation in everyone
    ]
    heads = ("model", "perplexity", "KL (nats)", "top-1", "bits/weight", "MB", "seconds", "density")
    shown = 7 if all(evaluation.attention_density is None for evaluation in everyone) else 8
    print_table(heads[:shown], (row[:shown] for row in rows))
    first = everyone[0]
    print(f"{first.protocol.describe()}; {first.tokens} predicted tokens")


def print_tasks(result: TaskComparison) -> None:
    """A row for each score of each model, reference first; differences with their 95% intervals."""
    everyone = ([result.reference] if result.reference else []) + result.candidates
    rows = []
    for evaluation in everyone:
        name = evaluation.model + (" (reference)" if evaluation is result.reference else "")
        for score in evaluation.scores:
            metric = score.metric + ("" if score.filter == "none" else f" ({score.filter})")
            gap = score.difference
            change = "-" if gap is None else f"{gap.value:+.4f}"
            interval = "-" if gap is None else f"{gap.low:+.4f} .. {gap.high:+.4f}"
            rows.append((name, score.task, metric, f"{score.value:.4f}", change, interval, str(score.examples)))
    print_table(("model", "task", "metric", "score", "difference", "95% interval", "examples"), rows)
    first = everyone[0]
    few = "" if first.few_shot is None else f", {first.few_shot} examples in the prompt"
    chunks = "" if first.chunk is None else f", in chunks of {first.chunk}"
    print(f"{first.dtype}{few}{chunks}; {sum(each.seconds for each in everyone):.1f} s; examples from {first.data}")


def print_long(result: LongComparison) -> None:
    """A row for each task and way of asking of each model, reference first, and the likelihood by position."""
    from rarefy.evaluation.long.results import gain, summarize

    everyone = ([result.reference] if result.reference else []) + result.candidates
    rows = []
    for evaluation in everyone:
        dense = None if evaluation is result.reference else result.reference
        for each in summarize(evaluation, dense):
            change, kl = each.nll_change, each.kl
            rows.append(
                (
                    evaluation.model + (" (reference)" if evaluation is result.reference else ""), each.task, each.mode,
                    f"{each.accuracy:.0%}", f"{each.nll:.3f}",
                    "-" if change is None else f"{change.value:+.3f} ({change.low:+.3f} .. {change.high:+.3f})",
                    "-" if kl is None else f"{kl.value:.4f} ({kl.low:.4f} .. {kl.high:.4f})", str(each.answers),
                )
            )  # fmt: skip
    print_table(("model", "task", "mode", "exact", "NLL", "NLL change (95%)", "KL (95%)", "answers"), rows)
    for evaluation in everyone:
        parts = []
        if evaluation.positions is not None:
            curve = evaluation.positions
            parts.append(
                "NLL by position "
                + ", ".join(f"{start}: {nll:.3f}" for (start, _), nll in zip(curve.bins, curve.nll, strict=True))
            )
        learned = gain(evaluation)
        if learned is not None:
            parts.append(f"the book of a language saves {learned:.3f} nats per token")
        if evaluation.stages is not None:
            kept = evaluation.stages
            parts.append(
                f"{kept.prefill_tokens_per_second:.0f} tokens/s encoded, "
                f"{kept.cache_bytes_per_token:.0f} bytes a token kept"
            )
        print(f"{evaluation.model}: {'; '.join(parts)}")
    print(f"{everyone[0].protocol.describe()}; {sum(each.seconds for each in everyone):.0f} s")


def _record(evaluation: Evaluation, result: Comparison) -> dict[str, Any]:
    record = evaluation.model_dump()
    record["reference"] = None if result.reference is None else result.reference.model_dump()
    return record
