"""``rarefy compare``: two models side by side, as wholes and layer by layer."""

from __future__ import annotations

from typing import Annotated

import typer

from rarefy.cli.common import Device, Json, command, print_record, print_table
from rarefy.cli.evaluate import print_comparison


@command
def compare(
    first: Annotated[str, typer.Argument(help="A model: folder, hub id, .gguf file or 'demo'.")],
    second: Annotated[str, typer.Argument(help="The model to hold against it.")],
    reference: Annotated[
        str | None, typer.Option(help="Dense model to measure both against; default: the first model.")
    ] = None,
    data: Annotated[str, typer.Option(help="Text file, or 'demo'.")] = "demo",
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option(min=0, help="Number of windows; 0 takes the whole text.")] = 12,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Size, bits, perplexity, KL, top-1 and speed of two models, and how their layers differ."""
    from rarefy import api
    from rarefy.evaluation.results import ModelDifference
    from rarefy.integrations.transformers.differences import compare_layers

    models = [second] if reference is None else [first, second]
    result = api.compare(
        models, reference=first if reference is None else reference, data=data, context=context,
        windows=windows or None, device=device,
    )  # fmt: skip
    layers = compare_layers(api.open_model(first).folder, api.open_model(second).folder)
    if as_json:
        found = ModelDifference(first=first, second=second, layers=layers)
        print_record("findings", {"comparisons": [result.model_dump()], "differences": [found.model_dump()]})
        return
    print_comparison(result)
    rows = [
        (
            layer.name, layer.first, layer.second, f"{layer.first_bits:.3f}", f"{layer.second_bits:.3f}",
            f"{layer.second_bits - layer.first_bits:+.3f}",
            "-" if layer.difference is None else f"{layer.difference:.4f}",
        )
        for layer in layers
    ]  # fmt: skip
    print()
    print_table(("layer", "first", "second", "bits", "bits", "change", "difference"), rows)
    print("difference: |second - first| / |first| of the weights (Frobenius norm)")
