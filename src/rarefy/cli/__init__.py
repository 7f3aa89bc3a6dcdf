"""The command line: one file per command; heavy libraries load only when a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from rarefy.cli import (
    attention,
    bench,
    chat,
    compare,
    compress,
    demo,
    evaluate,
    info,
    inspect,
    recipes,
    report,
    train,
    tune,
)
from rarefy.core.version import __version__

app = typer.Typer(
    name="rarefy",
    help="Make transformer models smaller and faster by sparsity and quantization, and say what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _command, _about in (
    ("compress", compress.compress, "Make a model smaller by a recipe."),
    ("train", train.train, "Train what a recipe adds to a model, such as gates."),
    ("eval", evaluate.evaluate, "Measure models: on text, tasks, long contexts, caches."),
    ("compare", compare.compare, "Two models side by side, layer by layer."),
    ("report", report.report, "Put results on one page."),
    ("attention", attention.attention, "Draw where attention looks, on one page."),
    ("chat", chat.chat, "Talk to a model."),
    ("bench", bench.bench, "Measure speed, beside others in the same process."),
    ("tune", tune.tune, "Fit a model's kernels to this GPU."),
    ("inspect", inspect.inspect, "Show layers, bits and bytes; nothing is loaded."),
    ("recipes", recipes.recipes, "List recipes, or show one with its options."),
    ("info", info.info, "Show versions, devices and kernels."),
    ("demo", demo.demo, "The whole job on a real model, in a minute."),
):
    app.command(_name, short_help=_about)(_command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"rarefy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of no command; the help of the app says what the program is for."""


def main() -> None:
    """Entry point of the ``rarefy`` script."""
    app()
