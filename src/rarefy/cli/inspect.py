"""``rarefy inspect``: what a model is made of, from its headers alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rarefy.cli.common import Json, Revision, bits_line, command, print_json, print_table


@command
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or 'demo'.")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show a model's layers, how each is stored and what it weighs; nothing is loaded."""
    from rarefy.integrations.transformers.description import describe
    from rarefy.sources.models import open_model

    source = open_model(model, revision)
    summary: dict[str, Any] = {"model": source.name, **describe(source.folder)}
    if as_json:
        print_json(summary)
        return
    print(f"{source.name}: {summary['architecture']}, {'compressed' if summary['compressed'] else 'dense'}")
    rows = [
        (
            layer["name"],
            "x".join(map(str, layer["shape"])),
            layer["stored_as"],
            f"{layer['bits_per_weight']:.3f}" if layer["bytes"] else "-",
            f"{layer['bytes'] / 1e6:.3f}" if layer["bytes"] else "-",
        )
        for layer in summary["layers"]
    ]
    print_table(("layer", "shape", "stored as", "bits/weight", "MB"), rows)
    print(f"layers {summary['layer_bytes'] / 1e6:.1f} MB, everything else {summary['other_bytes'] / 1e6:.1f} MB")
    if summary["bits_per_weight"]:
        print(f"bits/weight {bits_line(summary['bits_per_weight'])}")
