"""Fills the tables of README and docs from committed results and from the code, so that no number is typed.

    python benchmarks/tables.py          rewrite them
    python benchmarks/tables.py --check  fail if one is out of date

A block starts with ``<!-- table: NAME -->`` and ends with ``<!-- end -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import tables_attention
import tables_caches
import tables_ruler
import tables_speed
import tables_weights
from tables_shared import ROOT

BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def term_table() -> str:
    sys.path.insert(0, str(ROOT / "src"))
    from rarefy.formats import terms

    return "```\n" + (terms.__doc__ or "").strip() + "\n```"


TABLES: dict[str, Callable[[], str]] = {
    **tables_weights.TABLES, **tables_speed.TABLES, **tables_caches.TABLES, **tables_attention.TABLES,
    **tables_ruler.TABLES, "terms": term_table,
}  # fmt: skip


def main() -> None:
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text("utf-8")
        filled = BLOCK.sub(lambda match: f"{match[1]}{TABLES[match['name']]()}\n{match[3]}", text)
        if filled != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(filled, "utf-8")
    if stale and "--check" in sys.argv:
        raise SystemExit(f"out of date: {', '.join(stale)}; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
