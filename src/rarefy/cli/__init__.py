"""The command line: one file per command; heavy libraries load only when a command runs."""

from __future__ import annotations

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

app = typer.Typer(
    name="rarefy",
    help="Make transformer models smaller and faster by sparsity and quantization, and say what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _command in (
    ("compress", compress.compress),
    ("train", train.train),
    ("eval", evaluate.evaluate),
    ("compare", compare.compare),
    ("report", report.report),
    ("attention", attention.attention),
    ("chat", chat.chat),
    ("bench", bench.bench),
    ("tune", tune.tune),
    ("inspect", inspect.inspect),
    ("recipes", recipes.recipes),
    ("info", info.info),
    ("demo", demo.demo),
):
    app.command(_name)(_command)


def main() -> None:
    """Entry point of the ``rarefy`` script."""
    app()
