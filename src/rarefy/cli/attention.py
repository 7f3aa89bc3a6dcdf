"""``rarefy attention``: a page that shows where a plan looks, beside where attention really looks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli.common import Device, Json, command, print_json, shell_line


@command
def attention(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or 'demo'.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("attention.html"),
    text: Annotated[str, typer.Option(help="Text file, or 'demo'.")] = "demo",
    plan: Annotated[
        str | None, typer.Option(help="ID or ID:key=value,key=value; default: that of the checkpoint.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of the text, from its beginning on.")] = 2048,
    layers: Annotated[str, typer.Option(help="Layers to show, such as 0,5,11; default: all.")] = "",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw estimated, selected and true attention maps of every layer and head on one self-contained page."""
    from rarefy import api
    from rarefy.core.errors import OptionError

    try:
        chosen = [int(part) for part in layers.split(",") if part.strip()] or None
    except ValueError:
        raise OptionError(f"--layers '{layers}' is not a list of numbers; write it like 0,5,11.") from None
    found = api.attention_maps(model, plan, text=text, tokens=tokens, layers=chosen, device=device)
    from rarefy.core.environment import this_run
    from rarefy.reporting.attention import write_maps

    page = write_maps(found, out, this_run(shell_line(*sys.argv[1:])))
    if as_json:
        print_json({"page": str(page), **found.summary()})
        return
    facts = found.summary()
    print(f"{page} (open it in a browser)")
    print(
        f"  {facts['plan']} on {facts['tokens']} tokens: density {facts['density']:.1%}, mass kept "
        f"{facts['recall']:.1%} (the best blocks would keep {facts['best']:.1%}), output error {facts['error']:.3f}"
    )
