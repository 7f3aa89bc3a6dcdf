"""Texts to measure on and to calibrate with: files, and the two that come with the demo."""

from __future__ import annotations

import bisect
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rarefy.core.errors import OptionError, SourceError
from rarefy.sources.packaged import packaged_file
from rarefy.sources.paths import typed_path

Part = Literal["evaluation", "calibration"]
PLAIN = (".txt", ".raw", ".md")
CARRIER = "exllamav2"
FOLDER = "conversion/standard_cal_data"
SHA256 = {
    "wiki.utf8": "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
    "c4.utf8": "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505",
}


@dataclass(frozen=True)
class Text:
    """One long text. ``name`` is for tables, ``form`` says how it was made of its lines, ``note`` is for reports."""

    name: str
    text: str
    form: str
    note: str


def open_text(source: str | Path, part: Part) -> Text:
    """The text that ``source`` names, for ``part`` ("evaluation" or "calibration").

    ``demo``: a Wikipedia sample; its first two thirds are for evaluation, the last third together with a sample of C4
    for calibration. A file: UTF-8, the whole of it for either part. ``.txt``, ``.raw`` and ``.md`` as they are,
    ``.jsonl`` by the key ``text`` of every line (joined by an empty line), and ``wiki.*.raw`` in the form "hf-join":
    every line that is not blank keeps its line end, and two more line ends go between all lines.

    Raises SourceError for a file that is missing, empty, of another kind or not readable as such.
    """
    if part not in get_args(Part):
        raise OptionError(f"A text is for 'evaluation' or 'calibration', not '{part}'; choose one of the two.")
    if isinstance(source, str) and source == "demo":
        return _evaluation() if part == "evaluation" else _calibration()
    path = typed_path(source)
    content = _read(path)
    form = "as it is"
    if path.suffix == ".jsonl":
        content, form = _from_jsonl(path, content), "jsonl"
    elif path.name.startswith("wiki.") and path.suffix == ".raw":
        content, form = hf_join(content), "hf-join"
    if not content.strip():
        raise SourceError(f"Text '{path}' is empty; name a file with text in it.")
    return Text(path.name, content, form, f"file {path.name}")


def hf_join(content: str) -> str:
    """The form in which WikiText perplexities are published: blank lines become "", others keep their line end, and
    all are joined by two line ends."""
    lines = content.split("\n")
    if lines[-1] == "":
        lines.pop()
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def _read(path: Path) -> str:
    if path.suffix not in (*PLAIN, ".jsonl"):
        raise SourceError(f"'{path}' is not a text this reads; name a {', '.join(PLAIN)} or .jsonl file, or 'demo'.")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise SourceError(f"There is no text file '{path}'; check the path, or use 'demo'.") from None
    except IsADirectoryError:
        raise SourceError(f"'{path}' is a folder; name a text file in it.") from None
    except UnicodeDecodeError as failure:
        raise SourceError(f"'{path}' is not UTF-8 text (byte {failure.start}); convert it first.") from None
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise SourceError(f"'{path}' cannot be read ({reason}); name another text file.") from None


def _from_jsonl(path: Path, content: str) -> str:
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise SourceError(f"Line {number} of '{path}' is not JSON; repair or remove it.") from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise SourceError(f"Line {number} of '{path}' has no string under the key 'text'; add it.")
        texts.append(text)
    return "\n\n".join(texts)


def _evaluation() -> Text:
    first, _ = _wikipedia()
    note = "Wikipedia sample from the exllamav2 wheel, first two thirds, without <doc> lines"
    return Text("Wikipedia sample", first, "documents", note)


def _calibration() -> Text:
    _, last = _wikipedia()
    web = packaged_file(CARRIER, f"{FOLDER}/c4.utf8", SHA256["c4.utf8"]).read_bytes().decode("utf-8")
    note = "C4 sample and last third of the Wikipedia sample from the exllamav2 wheel, without <doc> lines"
    return Text("C4 and Wikipedia sample", f"{web.rstrip()}\n\n{last}", "documents", note)


def _wikipedia() -> tuple[str, str]:
    """The first two thirds and the last third, cut between two articles, without the lines that mark their bounds."""
    path = packaged_file(CARRIER, f"{FOLDER}/wiki.utf8", SHA256["wiki.utf8"])
    articles: list[list[str]] = []
    for line in path.read_bytes().decode("utf-8").split("\n"):
        if line.startswith("<doc "):
            articles.append([])
        elif line != "</doc>" and articles:
            articles[-1].append(line)
    whole = ["\n".join(lines) for lines in articles]
    ends = list(itertools.accumulate(map(len, whole)))
    cut = bisect.bisect(ends, 2 * ends[-1] // 3)
    return "\n".join(whole[:cut]), "\n".join(whole[cut:])
