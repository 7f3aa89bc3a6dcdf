"""The ground floor: files that are whole or absent, headers that lie, registries that suggest, configs that refuse."""

from __future__ import annotations

import io
import json
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rarefy.core import files, memory
from rarefy.core.config import StrictModel, parse
from rarefy.core.devices import copy_to_cpu
from rarefy.core.errors import CheckpointError, OptionError, RarefyError, RecipeError, first_line
from rarefy.core.files import TensorInfo, read_header, sha256_file, staged_folder, write_text
from rarefy.core.logs import logger
from rarefy.core.progress import progress, track
from rarefy.core.registry import Registry

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.codes": torch.arange(5, dtype=torch.uint8),
    "c.scale": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4, dtype=torch.int64),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def hidden(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


# --- atomic files ---------------------------------------------------------------------------------------------------


def test_write_text_replaces_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_text(path, "old" * 1000)
    write_text(path, "neu: ü\n")
    assert path.read_bytes() == "neu: ü\n".encode()
    assert not hidden(tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_text_keeps_the_old_content_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "config.json"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert not hidden(tmp_path)


def test_write_text_survives_a_kill(tmp_path: Path) -> None:
    """A process that dies at any moment of many writes leaves one whole version behind."""
    path = tmp_path / "state.json"
    code = (
        "import sys, itertools; from pathlib import Path; from rarefy.core.files import write_text\n"
        "for i in itertools.count(): write_text(Path(sys.argv[1]), f'{i % 10}' * 20000); print(i, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(20):
            writer.stdout.readline()
        writer.kill()
    text = path.read_text()
    assert len(text) == 20000
    assert len(set(text)) == 1


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX's")
def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "private.json", "{}")
        with staged_folder(tmp_path / "private", overwrite=False):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "private.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700


# --- staged folders -------------------------------------------------------------------------------------------------


def test_staged_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with staged_folder(out, overwrite=False) as stage:
        (stage / "config.json").write_text("{}")
        assert not out.exists()
    assert [entry.name for entry in out.iterdir()] == ["config.json"]
    assert not hidden(out.parent)


@pytest.mark.parametrize("overwrite", [False, True])
def test_staged_folder_fills_an_empty_folder(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with staged_folder(out, overwrite) as stage:
        (stage / "a").write_text("a")
    assert (out / "a").read_text() == "a"
    assert not hidden(tmp_path)


def test_staged_folder_refuses_a_full_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(OptionError, match="--overwrite"), staged_folder(out, overwrite=False):
        pytest.fail("the block must not start")
    assert (out / "precious").read_text() == "kept"


def test_staged_folder_overwrites_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with staged_folder(out, overwrite=True) as stage:
        (stage / "new").write_text("new")
        assert (out / "old").exists()
    assert [entry.name for entry in out.iterdir()] == ["new"]
    assert not hidden(tmp_path)


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_staged_folder_leaves_no_trace_of_a_failure(tmp_path: Path, failure: type[BaseException]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(failure), staged_folder(out, overwrite=True) as stage:
        (stage / "half").write_text("half")
        raise failure
    assert [entry.name for entry in out.iterdir()] == ["old"]
    assert not hidden(tmp_path)


def test_staged_folder_puts_the_old_one_back_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    with pytest.raises(OSError, match="Input/output"), staged_folder(out, overwrite=True) as stage:
        (stage / "new").write_text("new")
        monkeypatch.setattr(files.os, "replace", second_fails)
    assert [entry.name for entry in out.iterdir()] == ["old"]
    assert not hidden(tmp_path)


@pytest.mark.parametrize("where", ["here", "around", "home"])
def test_staged_folder_never_replaces_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    place = tmp_path / "place"
    (place / "inner").mkdir(parents=True)
    monkeypatch.chdir({"here": place, "around": place / "inner", "home": tmp_path}[where])
    if where == "home":
        monkeypatch.setenv("HOME", str(place))
        monkeypatch.setenv("USERPROFILE", str(place))
    out = Path(".") if where == "here" else place
    with pytest.raises(OptionError, match="must stay"), staged_folder(out, overwrite=True):
        pytest.fail("the block must not start")
    assert (place / "inner").is_dir()


def test_staged_folder_refuses_what_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, Path(os.devnull)):
        with pytest.raises(OptionError, match="not a folder"), staged_folder(out, overwrite=True):
            pytest.fail("the block must not start")
    with pytest.raises(OptionError, match="cannot be written"), staged_folder(file / "out", overwrite=True):
        pytest.fail("the block must not start")
    assert file.read_text() == "kept"


def test_staged_folder_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    try:
        (tmp_path / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let us make links")
    with staged_folder(tmp_path / "out", overwrite=False) as stage:
        (stage / "a").write_text("a")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "a"


def test_sha256_file(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- safetensors headers --------------------------------------------------------------------------------------------


def test_read_header_agrees_with_safetensors(checkpoint: Path) -> None:
    header = read_header(checkpoint)
    assert header.metadata == {"format": "pt"}
    raw = checkpoint.read_bytes()
    with safe_open(checkpoint, "pt") as reader:
        assert set(header.tensors) == set(reader.keys()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        info = header.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert info.nbytes == tensor.nbytes
        stored = raw[header.data_start + info.start : header.data_start + info.stop]
        assert stored == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.int16, torch.uint16, torch.float16, torch.bfloat16,
        torch.int32, torch.uint32, torch.float32, torch.int64, torch.uint64, torch.float64, torch.complex64,
    ],
)  # fmt: skip
def test_read_header_knows_every_dtype_that_torch_saves(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"x": torch.zeros(3, dtype=dtype)}, path)
    assert read_header(path).tensors["x"].nbytes == 3 * dtype.itemsize


def test_read_header_of_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    save_file({}, path)
    assert read_header(path).tensors == {}


def test_every_truncation_is_refused(checkpoint: Path) -> None:
    raw = checkpoint.read_bytes()
    for length in range(len(raw)):
        checkpoint.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_header(checkpoint)


def test_bytes_behind_the_last_tensor_are_refused(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="tensor bytes"):
        read_header(checkpoint)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, files.MAX_HEADER_BYTES + 1])
def test_a_header_length_beyond_the_file_is_refused(checkpoint: Path, length: int) -> None:
    checkpoint.write_bytes(struct.pack("<Q", length) + checkpoint.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(checkpoint)


def test_a_header_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", files.MAX_HEADER_BYTES + 1))
        stream.truncate(8 + files.MAX_HEADER_BYTES + 1)
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)


def change(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        header[name][key] = value

    return apply


def drop(name: str, *keys: str) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        if not keys:
            del header[name]
        for key in keys:
            del header[name][key]

    return apply


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        header[name] = value

    return apply


DAMAGE = {
    "retyped": change("a.weight", "dtype", "F64"),
    "unknown dtype": change("a.weight", "dtype", "F31"),
    "dtype is a list": change("a.weight", "dtype", ["F32"]),
    "dtype is null": change("a.weight", "dtype", None),
    "sub-byte dtype": change("a.weight", "dtype", "F4"),
    "reshaped": change("a.weight", "shape", [2, 4]),
    "negative shape": change("a.weight", "shape", [-2, -3]),
    "boolean shape": change("b.codes", "shape", [5, True]),
    "fractional shape": change("a.weight", "shape", [2.0, 3]),
    "shape is text": change("a.weight", "shape", "23"),
    "shape is a number": change("a.weight", "shape", 6),
    "shape beyond 64 bits": change("empty", "shape", [0, 2**64]),
    "shape of a million dimensions": change("empty", "shape", [2**62] * 1_000_000),
    "no shape": drop("a.weight", "shape"),
    "no dtype": drop("a.weight", "dtype"),
    "no offsets": drop("a.weight", "data_offsets"),
    "negative offset": change("a.weight", "data_offsets", [-24, 0]),
    "boolean offset": change("b.codes", "data_offsets", [False, 5]),
    "reversed offsets": change("a.weight", "data_offsets", [24, 0]),
    "three offsets": change("a.weight", "data_offsets", [0, 24, 24]),
    "offsets beyond the file": change("a.weight", "data_offsets", [10**15, 10**15 + 24]),
    "entry is null": put("a.weight", None),
    "entry is a list": put("a.weight", [1, 2]),
    "gap: a tensor is missing": drop("a.weight"),
    "an extra tensor over another's bytes": put("d", {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}),
    "an extra tensor behind the end": put("d", {"dtype": "U8", "shape": [9], "data_offsets": [35, 44]}),
    "metadata is a list": put("__metadata__", []),
    "metadata is false": put("__metadata__", False),
    "metadata holds numbers": put("__metadata__", {"format": 1}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_header_that_lies_is_refused(checkpoint: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    header, data = header_of(checkpoint)
    damage(header)
    write_raw(checkpoint, json.dumps(header).encode(), data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        read_header(checkpoint)
    assert "\n" not in str(caught.value)


def test_overlapping_ranges_of_the_right_total_are_refused(checkpoint: Path) -> None:
    """Two tensors over the same bytes and a gap elsewhere add up to the file's size."""
    header = {
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
        "c": {"dtype": "U8", "shape": [2], "data_offsets": [6, 8]},
    }
    write_raw(checkpoint, json.dumps(header).encode(), bytes(8))
    with pytest.raises(CheckpointError, match="'b'"):
        read_header(checkpoint)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b"not json",
        b'{"a"',
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"a": ' + b"9" * 100_000 + b"}",
        json.dumps({}).encode("utf-16"),
    ],
    ids=["nothing", "null", "list", "number", "text", "cut", "bytes", "deep lists", "deep objects", "digits", "utf-16"],
)
def test_a_header_that_is_no_header_is_refused(checkpoint: Path, header: bytes) -> None:
    write_raw(checkpoint, header, b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(checkpoint)


@pytest.mark.parametrize("twin", ["tensor", "key", "metadata"])
def test_duplicate_keys_are_refused(checkpoint: Path, twin: str) -> None:
    """JSON readers disagree on which twin counts, so that one program would check what another does not load."""
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = {
        "tensor": f'{{"a":{entry},"a":{entry}}}',
        "key": '{"a":{"dtype":"U8","shape":[7],"shape":[1],"data_offsets":[0,1]}}',
        "metadata": f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{entry}}}',
    }[twin]
    write_raw(checkpoint, header.encode(), b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(checkpoint)


def test_missing_files_and_folders_are_checkpoint_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_header(path)


@given(st.data())
def test_what_we_accept_safetensors_accepts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Flipped bytes in the header: refused with our error, or a file that safetensors opens with the same names."""
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    save_file(TENSORS, path)
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    try:
        with safe_open(path, "pt") as reader:
            names = set(reader.keys())
    except SafetensorError as refusal:
        # Stricter than we are: unknown fields of an entry change nothing that we read.
        assert "unknown field" in str(refusal)
    else:
        assert names == set(header.tensors)


def test_tensor_info_counts_bytes() -> None:
    assert TensorInfo("F32", (2, 3), 8, 32).nbytes == 24


# --- registries -----------------------------------------------------------------------------------------------------


class Thing:
    """What the registry of these tests holds."""


def test_registry_returns_and_lists_what_was_registered() -> None:
    things = Registry[Thing]("thing", RecipeError)

    @things.register("second")
    class Second(Thing):
        pass

    @things.register("first")
    class First(Thing):
        pass

    assert things.get("first") is First
    assert things.names() == list(things) == ["first", "second"]
    assert "second" in things
    assert "third" not in things


def test_registry_suggests_the_nearest_name() -> None:
    things = Registry[Thing]("recipe", RecipeError)
    things.register("gptq")(Thing)
    with pytest.raises(RecipeError, match=r"^Unknown recipe 'gtpq'; did you mean 'gptq'\?$"):
        things.get("gtpq")
    with pytest.raises(RecipeError, match=r"known: gptq\.$"):
        things.get("completely different")
    with pytest.raises(RecipeError, match=r"known: none\.$"):
        Registry[Thing]("recipe", RecipeError).get("x")


def test_registry_refuses_a_taken_name_but_takes_a_reload() -> None:
    things = Registry[Thing]("thing", RecipeError)
    things.register("x")(Thing)
    things.register("x")(Thing)
    with pytest.raises(RecipeError, match="'x' is already registered by"):
        things.register("x")(type("Other", (Thing,), {}))
    assert things.get("x") is Thing


# --- strict configs -------------------------------------------------------------------------------------------------


class Inner(StrictModel):
    group_size: int = 128


class Options(StrictModel):
    num_bits: int = pydantic.Field(4, ge=1, le=8)
    symmetric: bool = False
    inner: Inner = Inner()

    @pydantic.field_validator("num_bits")
    @classmethod
    def _not_seven(cls, value: int) -> int:
        if value == 7:
            raise ValueError("7 bits waste one; use 6 or 8.")
        return value


def test_parse_accepts_and_freezes() -> None:
    options = parse(Options, {"num_bits": 3, "inner": {"group_size": 64}}, "options", OptionError)
    assert options.inner.group_size == 64
    with pytest.raises(pydantic.ValidationError):
        options.num_bits = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"num_bit": 3}, "rtn options: 'num_bit' is not an option; did you mean 'num_bits'?"),
        ({"zzz": 3}, "rtn options: 'zzz' is not an option; known: inner, num_bits, symmetric."),
        ({"inner": {"gs": 3}}, "rtn options: 'inner.gs': Extra inputs are not permitted (got 3)."),
        (
            {"num_bits": 9},
            "rtn options: 'num_bits': Input should be less than or equal to 8 (got 9).",
        ),
        ({"num_bits": 7}, "rtn options: 'num_bits': 7 bits waste one; use 6 or 8 (got 7)."),
        ([1], "rtn options: 'value': Input should be a valid dictionary or instance of Options (got [1])."),
    ],
)
def test_parse_names_the_key(data: Any, sentence: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(Options, data, "rtn options", OptionError)
    assert str(caught.value) == sentence
    assert caught.value.__cause__ is None


def test_parse_shortens_what_it_was_given() -> None:
    with pytest.raises(RarefyError) as caught:
        parse(Options, {"num_bits": "x" * 5000}, "options", OptionError)
    assert len(str(caught.value)) < 250


# --- progress, logs, memory -----------------------------------------------------------------------------------------


def test_plain_progress_writes_lines_to_stderr_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[progress.__module__], "PLAIN_INTERVAL", 0.0)
    with progress("blocks", total=4) as advance:
        advance(2, note="[layers.0]")
        advance()
    assert list(track(iter("ab"), "letters")) == ["a", "b"]
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("blocks: 2/4, ") and lines[0].endswith("s left, [layers.0]")
    assert lines[-1] == "letters: 2"


def test_progress_is_silent_when_it_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "numbers")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_progress_that_must_not_disturb_draws_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules[progress.__module__], "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("bench", total=2, live=False) as advance:
        advance(note="us")
    assert capsys.readouterr().err == "bench: 1/2, 0 s left, us\n"


def test_terminal_progress_shows_notes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets in a tensor's name are not markup."""
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress("solving [/x]", total=2) as advance:
        advance(1, note="experts[3]")
    assert "experts[3]" in screen.getvalue()
    assert "solving [/x]" in screen.getvalue()


def test_an_error_s_first_line_goes_into_a_sentence() -> None:
    assert first_line(ValueError("\nno such thing.\nSee the manual.\n")) == "no such thing"
    assert first_line(KeyError()) == "KeyError"


def test_copies_may_be_made_later() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    copies = copy_to_cpu({"turned": tensor.T, "none": torch.empty(0)})()
    assert torch.equal(copies["turned"], tensor.T) and copies["turned"].is_contiguous()
    assert copies["none"].shape == (0,)


def test_loggers_lie_under_rarefy() -> None:
    assert logger("rarefy.core.files").name == "rarefy.core.files"
    assert logger("recipes").name == "rarefy.recipes"
    assert logger("rarefying").name == "rarefy.rarefying"
    assert logger("rarefy") is logging.getLogger("rarefy")


def test_memory_reports_bytes(tmp_path: Path) -> None:
    ballast = os.urandom(1 << 20) * 64
    peak, available = memory.peak_bytes(), memory.available_bytes()
    assert peak == 0 or peak > len(ballast)
    assert available is None or available > 0
    assert memory.free_disk_bytes(tmp_path / "not" / "there") > 0


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (28_500_000, "28.5 MB"), (3e9, "3.0 GB"), (2e15, "2000.00 TB")],
)
def test_human_sizes(size: float, text: str) -> None:
    assert memory.human(size) == text
