"""``rarefy report``: results of other commands on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli.common import Json, command, print_json


@command
def report(
    results: Annotated[list[Path], typer.Argument(help="Files that commands wrote with --json, or folders of them.")],
    out: Annotated[Path, typer.Option(help="The page to write; its data go beside it as .json.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page; default: the dense model's name.")] = "",
    as_json: Json = False,
) -> None:
    """Put results on one self-contained HTML page: summary, trade-offs, layers, tasks, commands and environment."""
    from rarefy.reporting.findings import read_findings
    from rarefy.reporting.page import write_report

    page, data = write_report(read_findings(results), out, title)
    if as_json:
        print_json({"page": str(page), "data": str(data)})
    else:
        print(f"{page} (open it in a browser), its data in {data}")
