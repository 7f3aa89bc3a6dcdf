"""``rarefy eval``: perplexity, and distance from a dense reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rarefy.cli.common import Device, Json, command, print_json, print_table

if TYPE_CHECKING:
    from rarefy.evaluation.results import Comparison, Evaluation


@command
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models: folders, hub ids, .gguf files or 'demo'.")],
    reference: Annotated[
        str | None, typer.Option(help="Dense model to measure KL and top-1 agreement against.")
    ] = None,
    data: Annotated[str, typer.Option(help="Text file, or 'demo'.")] = "demo",
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option(min=0, help="Number of windows; 0 takes the whole text.")] = 12,
    executor: Annotated[str, typer.Option(help="exact, or fast (may quantize activations).")] = "exact",
    dtype: Annotated[str, typer.Option(help="Dtype of the forward pass: auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure models on the same text under a stated protocol."""
    from rarefy.core.errors import OptionError

    if executor not in ("exact", "fast"):
        raise OptionError(f"--executor '{executor}' is unknown; use exact or fast.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise OptionError(f"--dtype '{dtype}' is unknown; use auto, float32, bfloat16 or float16.")
    chosen: Literal["exact", "fast"] = "fast" if executor == "fast" else "exact"
    from rarefy import api

    result = api.compare(
        models, reference=reference, data=data, context=context, windows=windows or None, executor=chosen, dtype=dtype,
        device=device,
    )  # fmt: skip
    if as_json:
        records = [_record(evaluation, result) for evaluation in result.candidates]
        print_json(records[0] if len(records) == 1 else records)
        return
    print_comparison(result)


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
        )
        for evaluation in everyone
    ]
    print_table(("model", "perplexity", "KL (nats)", "top-1", "bits/weight", "MB", "seconds"), rows)
    first = everyone[0]
    print(f"{first.protocol.describe()}; {first.tokens} predicted tokens")


def _record(evaluation: Evaluation, result: Comparison) -> dict[str, Any]:
    record = evaluation.model_dump()
    dense = result.reference
    record["reference"] = None if dense is None else {"model": dense.model, "perplexity": dense.perplexity}
    return record
