"""Killed, interrupted, out of disk, damaged, changed, or run twice at once: nothing is lost, nothing is silent."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rarefy
from rarefy.calibration import activations, driver, journal, plan
from rarefy.calibration.activations import FileStream, MemoryStream
from rarefy.core import files as core_files
from rarefy.core.errors import OptionError
from tests.calibration import recipes
from tests.calibration.processes import METHODS, compress, die, small_batches_, tokens
from tests.processes import environment, fresh_process
from tests.zoo import dense_folder, tiny_tokenizer

transformers.logging.set_verbosity_error()

@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dense"
    with torch.random.fork_rng(devices=[]):
        dense_folder("bert_lm", folder, num_hidden_layers=3)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches_(monkeypatch)


# The process dies

# Where it dies: (object, function, which call, before or after it).
POINTS = {
    "before anything is solved": "FileStream,write,2,after",
    "in the middle of a block": "FileStream,write,5,after",
    "before a block's file": "Journal,keep,2,before",
    "between its file and its activations": "FileStream,commit,3,before",
    "between its activations and the journal": "Journal,advance,2,before",
    "after the last block": "Journal,advance,3,after",
    "while the output is written": "ShardWriter,add,20,after",
}
SWEEP = {"in the middle of the reverse sweep": "gradients,keep_tensors,2,after"}


@pytest.fixture(scope="module")
def undisturbed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        small_batches_(patch)
        for method in METHODS:
            compress(dense, root / method, method=method)
    return {method: contents(root / method) for method in METHODS}


@pytest.mark.parametrize(
    ("method", "where"),
    [(METHODS[0], where) for where in POINTS]
    + [(METHODS[1], where) for where in ("in the middle of the reverse sweep", "in the middle of a block")]
    + [(METHODS[2], "between its activations and the journal")],
)
def test_killed_anywhere_it_ends_in_the_same_bytes(
    method: str, where: str, dense: Path, tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    out, work = tmp_path / "place" / "small", tmp_path / "work"
    out.parent.mkdir()
    point = (POINTS | SWEEP)[where]
    if method == METHODS[1] and "FileStream" in point:
        point = "Journal,keep,2,after"  # gradients need no streams
    killed = fresh_process(die, point, torch.get_num_threads(), (dense, out, work, method))
    assert killed == -signal.SIGKILL
    assert not out.exists()
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    units = json.loads((work / "job.json").read_text())["progress"]["units"]
    compress(dense, out, work, method)
    assert contents(out) == undisturbed[method]
    assert all((work / f"{unit}.safetensors").stat().st_mtime_ns == before[f"{unit}.safetensors"] for unit in units)
    assert sorted(path.name for path in work.iterdir() if not path.name.startswith(".")) == [
        *(f"bert.encoder.layer.{index}.safetensors" for index in range(3)), "job.json", "outside.safetensors",
    ]  # fmt: skip


COMMAND = """
import sys, time
from tests.calibration import recipes
from tests.calibration.recipes import GramRecipe
solve = GramRecipe.solve
def slow(self, layer):
    if "layer.1" in layer.name:
        print("solving", file=sys.stderr, flush=True)
        time.sleep(float(sys.argv.pop(1)) if sys.argv[1][0].isdigit() else 0.05)
    return solve(self, layer)
GramRecipe.solve = slow
if sys.argv[1] == "stubborn":  # what is put away takes long
    import shutil
    del sys.argv[1]
    shutil.rmtree = lambda *args, **kwargs: (print("cleaning", file=sys.stderr, flush=True), time.sleep(60))
from rarefy.cli import app
sys.argv[0] = "rarefy"
app()
"""


@pytest.fixture
def command(dense: Path, tmp_path: Path) -> Any:
    (tmp_path / "text.txt").write_text("a b c d e f g h i j k l " * 30)
    (tmp_path / "job.yaml").write_text("name: job\nrules: [{method: gram_for_tests}]\n")

    def start(*before: str, out: str = "small") -> subprocess.Popen[str]:
        files = {"recipe": "job.yaml", "data": "text.txt", "out": out, "work-dir": "work"}
        options = [part for name, file in files.items() for part in (f"--{name}", str(tmp_path / file))]
        options += ["--samples", "6", "--seq-len", "12", "--device", "cpu"]
        line = [sys.executable, "-c", COMMAND, *before, "compress", str(dense), *options]
        return subprocess.Popen(
            line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )

    return start


def until(process: subprocess.Popen[str], word: str) -> str:
    """What it said up to ``word``."""
    said = ""
    assert process.stderr is not None
    while word not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


def test_interrupted_it_prints_the_command_that_goes_on(command: Any, tmp_path: Path) -> None:
    process = command()
    said = until(process, "solving")
    assert said.startswith("plan: one block ") and "activations" in said and "on disk" in said
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130 and out == ""
    line = error.strip().splitlines()[-1]
    assert line.startswith("interrupted. Go on with: ") and "--work-dir" in line and "Traceback" not in error
    assert not (tmp_path / "small").exists()
    process = command()
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert f"-> {tmp_path / 'small'}" in out and "layer error" in out and "calibrated on" in out


def test_interrupted_twice_it_leaves_at_once(command: Any) -> None:
    process = command("stubborn")
    until(process, "solving")
    process.send_signal(signal.SIGINT)
    until(process, "cleaning")
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - start < 20


# The disk is full


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_disk_that_is_full(call: int, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(dense, tmp_path / "whole")
    write, left = core_files.write_tensors, [call]

    def full(*args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr("rarefy.calibration.kept.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        compress(dense, tmp_path / "small", tmp_path / "work")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole", "work"]
    compress(dense, tmp_path / "small", tmp_path / "work")
    assert contents(tmp_path / "small") == contents(tmp_path / "whole")


def test_a_disk_without_room_for_activations(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is taken when the files are made: no write into a mapped file can fail later."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(activations, "_reserve", full)
    with pytest.raises(OSError, match="No space left"):
        compress(dense, tmp_path / "small", tmp_path / "work")
    monkeypatch.undo()
    monkeypatch.setattr(plan, "free_disk_bytes", lambda _: 10_000)
    with pytest.raises(OptionError, match=r"keeps 15\.4 kB of activations on disk, but only 10\.0 kB are free"):
        compress(dense, tmp_path / "small", tmp_path / "other")
    assert not (tmp_path / "small").exists()


def test_activations_that_do_not_fit_memory_are_mapped(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    """In memory or in files: the same bytes, and no files left."""
    made = []
    init = FileStream.__init__
    monkeypatch.setattr(FileStream, "__init__", lambda self, *args: (made.append(args[0]), init(self, *args))[1])
    monkeypatch.setattr(plan, "available_bytes", lambda: 1000)
    for method in METHODS:
        compress(dense, tmp_path / method, method=method)
        assert contents(tmp_path / method) == undisturbed[method]
    assert len(made) == 2 and not any(folder.exists() for folder in made)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(METHODS)


# The folder is not what it was


@pytest.fixture
def half_done(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder whose job ended after two blocks."""
    advance, left = journal.Journal.advance, [2]

    def stop(self: Any, *args: Any, **kwargs: Any) -> None:
        advance(self, *args, **kwargs)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(dense, tmp_path / "small", tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("job.json", "text"), ("job.json", "unknown"), ("bert.encoder.layer.0.safetensors", "flip"),
        ("bert.encoder.layer.0.safetensors", "truncate"), ("bert.encoder.layer.1.safetensors", "absent"),
        ("rank-0/inputs-compressed-1.bin", "flip"), ("rank-0/inputs-compressed-1.bin", "truncate"),
        ("rank-0/inputs-compressed-1.bin", "absent"), ("rank-0/inputs-compressed.json", "text"),
        ("rank-0/inputs-compressed.json", "absent"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(name: str, damage: str, dense: Path, half_done: Path, tmp_path: Path) -> None:
    path = half_done / name
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes({
            "text": b"hello", "unknown": b'{"marks": {}, "progress": {"units": 3}}', "flip": bytes(raw),
            "truncate": bytes(raw[:-20]),
        }[damage])  # fmt: skip
    with pytest.raises(OptionError, match=r"--work-dir.* (is|are) damaged.*delete the folder"):
        compress(dense, tmp_path / "small", half_done)
    assert not (tmp_path / "small").exists()
    shutil.rmtree(half_done)
    compress(dense, tmp_path / "small", half_done)


def test_another_job_is_refused_by_what_differs(dense: Path, half_done: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    dense_folder("bert_lm", other, num_hidden_layers=3, type_vocab_size=3)
    changes: dict[str, Any] = {
        "calibration data": {"data": tokens(5)}, "recipe": {"options": {"num_bits": 4}},
        "model": {"source": other}, "seed": {"seed": 1},
    }  # fmt: skip
    for what, change in changes.items():
        with pytest.raises(OptionError, match=f"holds a job with another {what}; name another folder, or delete"):
            compress(**({"source": dense, "out": tmp_path / "small", "work": half_done} | change))
    with pytest.raises(OptionError, match="another recipe"):
        compress(dense, tmp_path / "small", half_done, "gram_for_tests")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(OptionError, match="another number of threads or processes"):
            compress(dense, tmp_path / "small", half_done)
    finally:
        torch.set_num_threads(threads)
    compress(dense, tmp_path / "small", half_done)


def test_a_job_takes_its_folder_before_its_first_block(dense: Path, tmp_path: Path) -> None:
    """Gradients of other data must not be taken for this job's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.Driver, "_block", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(dense, tmp_path / "small", tmp_path / "work", METHODS[1])
    assert len(list((tmp_path / "work" / "rank-0").glob("gradients-*"))) == 3
    with pytest.raises(OptionError, match="another calibration data"):
        compress(dense, tmp_path / "small", tmp_path / "work", METHODS[1], data=tokens(5))


def test_two_processes_on_one_folder(dense: Path, tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from rarefy.calibration.journal import Journal\n"
    code += "held = Journal(Path(sys.argv[1]), {}); print('held', flush=True); time.sleep(300)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "work")], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(OptionError, match="in use by another process"):
            compress(dense, tmp_path / "small", tmp_path / "work")
    finally:
        process.kill()
        process.communicate()


def test_a_finished_job_is_not_done_again(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(dense, tmp_path / "one", tmp_path / "work")
    monkeypatch.setattr(recipes.ImportanceRecipe, "solve", lambda *_: pytest.fail("solved again"))
    report = compress(dense, tmp_path / "two", tmp_path / "work")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert all(layer.output_error is not None for layer in report.layers)


def test_a_model_in_memory_goes_on_too(dense: Path, half_done: Path, tmp_path: Path) -> None:
    """Its bytes are known by their hashes, not by a file's date, so a job on a folder is another one."""
    model = rarefy.load(dense)
    with pytest.raises(OptionError, match="another model"):
        compress(model, None, half_done)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.Driver, "_outside", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(model, None, tmp_path / "again")
    report = compress(rarefy.load(dense), None, tmp_path / "again")
    plain = compress(model, None)
    assert [(one.name, one.relative_error) for one in report.layers] == [
        (one.name, one.relative_error) for one in plain.layers
    ]


def test_streams_alternate_between_two_files(tmp_path: Path) -> None:
    shapes = [(2, 3, 4), (1, 5, 4)]
    values = [torch.randn(shape).round() for shape in shapes]
    streams: list[Any] = [FileStream(tmp_path, "x", shapes, torch.float32, 0), MemoryStream(2, torch.float32, "cpu")]
    for step in range(3):
        for stream in streams:
            for batch, value in enumerate(values):
                stream.write(batch, value + step)
                if step and isinstance(stream, FileStream):
                    assert torch.equal(stream.read(batch), value + step - 1)
            stream.commit()
            assert all(torch.equal(stream.read(batch), value + step) for batch, value in enumerate(values))
    again = FileStream(tmp_path, "x", shapes, torch.float32, 3)
    assert torch.equal(again.read(1), values[1] + 2)
    back = FileStream(tmp_path, "x", shapes, torch.float32, 2)  # the journal is one block behind
    assert torch.equal(back.read(0), values[0] + 1)
    with pytest.raises(OptionError, match="damaged"):
        FileStream(tmp_path, "x", [(2, 3, 4)], torch.float32, 3)
