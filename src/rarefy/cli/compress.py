"""``rarefy compress``: a model in, a smaller model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli.common import Device, Json, Revision, bits_line, command, leads, parse_options, print_record, say


@command
def compress(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or 'demo'.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help="Recipe id, preset or YAML file; see 'rarefy recipes'.")] = "rtn",
    option: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Recipe option.")] = None,
    data: Annotated[str | None, typer.Option(help="Calibration text: a file or 'demo'.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a calibration sequence.")] = 2048,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    work_dir: Annotated[Path | None, typer.Option(help="Keep solved layers here, to go on after a break.")] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of recipes that draw numbers.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB.")] = "2GB",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Compress a model by a recipe into a folder that Transformers loads."""
    from rarefy.core.memory import human

    options = parse_options(option or [])
    from rarefy import api
    from rarefy.calibration.report import by_reason

    report = api.compress(
        model, recipe, options=options, out=out, data=data, samples=samples, seq_len=seq_len, work_dir=work_dir,
        device=device, seed=seed, max_shard_size=max_shard_size, overwrite=overwrite, revision=revision,
    )  # fmt: skip
    if not leads():
        return
    for note in by_reason(report.layers):
        say(f"fallback: {note}")
    if as_json:
        print_record("compression", report.model_dump())
        return
    errors = [layer.relative_error for layer in report.layers]
    print(f"{report.model} -> {report.out}")
    print(f"  recipe        {report.recipe}, {len(report.layers)} layers, {len(report.skipped)} left dense")
    print(f"  bits/weight   {bits_line(report.bits_per_weight)}")
    print(
        f"  whole model   {human(report.dense_bytes)} -> {human(report.stored_bytes)} "
        f"({report.dense_bytes / report.stored_bytes:.2f}x smaller)"
    )
    print(f"  layer error   mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f}")
    print(f"  took          {report.seconds:.1f} s, peak memory {human(report.peak_bytes)}")
    for note in report.notes:
        print(f"  note          {note}")
