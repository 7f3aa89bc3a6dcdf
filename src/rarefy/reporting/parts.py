"""What a page is put together from: cards, sections and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rarefy.reporting.figures import Figure


@dataclass(frozen=True)
class Card:
    """One model, or one comparison of many, in a sentence and a few numbers."""

    name: str
    gist: str
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Numbers; the first column of each row is its heading."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of the page: an anchor, a heading, paragraphs, figures and tables."""

    anchor: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
