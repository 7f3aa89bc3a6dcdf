"""``rarefy train``: what a recipe has to learn, learned from the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli.common import Device, Json, Revision, command, parse_options, print_record


@command
def train(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or 'demo'.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help="Recipe that has something to learn.")] = "seer_attention",
    option: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Recipe option.")] = None,
    data: Annotated[str, typer.Option(help="Training text: a file or 'demo'.")] = "demo",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 1,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 2048,
    samples: Annotated[int | None, typer.Option(min=1, help="Sequences to draw; default: as steps need.")] = None,
    rate: Annotated[float, typer.Option(min=0, help="Highest learning rate.")] = 1e-3,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    work_dir: Annotated[Path | None, typer.Option(help="Keep the state here, to go on after a break.")] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Draws the order of the text.")] = 0,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Train what a recipe adds to a model (the model itself stays as it is) and write both into a folder."""
    from rarefy.core.memory import human

    options = parse_options(option or [])
    from rarefy import api

    report = api.train(
        model, recipe, options=options, out=out, data=data, steps=steps, batch=batch, seq_len=seq_len, samples=samples,
        rate=rate, work_dir=work_dir, device=device, seed=seed, overwrite=overwrite, revision=revision,
    )  # fmt: skip
    if as_json:
        print_record("training", report.model_dump())
        return
    print(f"{report.model} -> {report.out}")
    print(f"  recipe   {report.recipe}, {human(report.bytes)} of it trained")
    print(f"  loss     {report.loss[0]:.4f} -> {report.loss[1]:.4f} in {report.steps} steps, {report.tokens} tokens")
    print(f"  took     {report.seconds:.1f} s, on {report.data}")
    for note in report.notes:
        print(f"  note     {note}")
