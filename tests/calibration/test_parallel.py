"""Several processes on one job, over gloo: the same result as one, one voice, and nobody waits for the dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rarefy
from rarefy.calibration import journal
from rarefy.calibration.parallel import Ranks
from rarefy.core.errors import RarefyError, RecipeError
from rarefy.layers import checkpoint
from tests.calibration import recipes
from tests.calibration.oracle import close
from tests.calibration.processes import compress, small_batches_, tokens
from tests.calibration.recipes import SEEN
from tests.processes import environment, side_by_side
from tests.zoo import dense_folder, tensors, tiny_tokenizer

ROWS = 9
# Sums over two shares of the data differ in their last bits; a code changes only where it lay on the edge of two.
IDENTICAL = 0.999


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dense"
    with torch.random.fork_rng(devices=[]):
        dense_folder("bert_lm", folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def work(rank: int, source: Path, root: Path, method: str, settings: dict[str, Any]) -> None:
    """Compress, and note what this process did: its layers, what it saw of them, and the report it returned."""
    small_batches_(pytest.MonkeyPatch())
    report = compress(source, root / "out", settings.pop("work", None), method, data=tokens(rows=ROWS), **settings)
    (root / f"report-{rank}.json").write_text(report.model_dump_json())
    found = {}
    for name, layer in SEEN.items():
        statistics = layer.statistics
        for label in ("gram", "fisher"):
            if (statistic := getattr(statistics, label)) is not None:
                found[f"{name}.{label}"] = statistic.sum.clone()
        found[f"{name}.weight"] = layer.weight.clone()
    save_file(found, root / f"seen-{rank}.safetensors")


def seen(root: Path, ranks: int) -> tuple[dict[str, torch.Tensor], list[set[str]]]:
    shares = [load_file(root / f"seen-{rank}.safetensors") for rank in range(ranks)]
    return {name: tensor for share in shares for name, tensor in share.items()}, [set(share) for share in shares]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("importance_for_tests", {}),
        ("importance_for_tests", {"true_sequential": True}),
        ("importance_for_tests", {"inputs": "dense"}),
        ("everything_for_tests", {}),
        ("scaled_for_tests", {}),
    ],
)
def test_two_processes_do_what_one_does(method: str, options: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        codes = side_by_side(ranks, work, dense, tmp_path / str(ranks), method, {"options": options})
        assert codes == [0] * ranks
    one, _ = seen(tmp_path / "1", 1)
    two, shares = seen(tmp_path / "2", 2)
    assert one.keys() == two.keys()
    # The first block was the same for both; later ones see the output of codes of which a few may differ.
    for name in one:
        tolerance = 1e-5 if ".layer.0." in name or options.get("inputs") == "dense" else 1e-2
        assert close(two[name], one[name].double()) < tolerance, name
    # Layers are solved once, by one or the other, but in true sequence there is one input at a time to solve for.
    assert not shares[0] & shares[1]
    assert shares[0] and bool(shares[1]) != bool(options.get("true_sequential"))
    codes = [tensors(tmp_path / str(ranks) / "out") for ranks in (1, 2)]
    assert codes[0].keys() == codes[1].keys()
    same = [torch.eq(codes[0][name], codes[1][name]).float().mean() for name in codes[0] if name.endswith("codes")]
    assert not same or min(same) >= IDENTICAL
    reports = [json.loads((tmp_path / "2" / f"report-{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0] == reports[1]
    alone = json.loads((tmp_path / "1" / "report-0.json").read_text())
    assert [layer["name"] for layer in reports[0]["layers"]] == [layer["name"] for layer in alone["layers"]]
    assert reports[0]["stored_bytes"] == alone["stored_bytes"] and reports[0]["notes"] == alone["notes"]
    assert sorted(path.name for path in (tmp_path / "2").iterdir()) == [
        "out", "report-0.json", "report-1.json", "seen-0.safetensors", "seen-1.safetensors",
    ]  # fmt: skip


def interrupted(rank: int, source: Path, root: Path, method: str, folder: Path) -> None:
    """End in the middle: of the first process after the second block, of the second wherever it is then."""
    advance, left = journal.Journal.advance, [2]

    def stop(self: Any, *args: Any, **kwargs: Any) -> None:
        advance(self, *args, **kwargs)
        left[0] -= 1
        if not left[0] and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    journal.Journal.advance = stop  # type: ignore[method-assign]
    work(rank, source, root, method, {"work": folder})


@pytest.mark.parametrize("method", ["everything_for_tests", "scaled_for_tests"])
def test_processes_go_on_together(method: str, dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
    assert side_by_side(2, work, dense, tmp_path / "whole", method, {}) == [0, 0]
    codes = side_by_side(2, interrupted, dense, tmp_path / "again", method, folder)
    assert codes[0] == -signal.SIGKILL and codes[1] == 1
    assert not (tmp_path / "again" / "out").exists()
    with pytest.raises(RarefyError, match="another number of threads or processes"):
        compress(dense, tmp_path / "small", folder, method, data=tokens(rows=ROWS))
    assert side_by_side(2, work, dense, tmp_path / "again", method, {"work": folder}) == [0, 0]
    left, right = (tmp_path / name / "out" / "rarefy.safetensors" for name in ("whole", "again"))
    assert left.read_bytes() == right.read_bytes()


def in_memory(rank: int, source: Path, root: Path, folder: Path) -> None:
    small_batches_(pytest.MonkeyPatch())
    model = rarefy.load(source)
    compress(model, root / "out", folder, data=tokens(rows=ROWS))
    rarefy.save(model, root / f"own-{rank}")


def test_a_model_in_memory_is_compressed_in_every_process(dense: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time all is found in the first one's folder
        codes = side_by_side(2, in_memory, dense, tmp_path / "root", tmp_path / "work")
        assert codes == [0, 0]
        files = [(tmp_path / "root" / name / "rarefy.safetensors").read_bytes() for name in ("out", "own-0", "own-1")]
        assert files[0] == files[1] == files[2]
        for name in ("out", "own-0", "own-1"):
            (tmp_path / "root" / name).rename(tmp_path / f"{name}-{time.monotonic()}")


def failing(rank: int, source: Path, root: Path, which: int, what: str) -> None:
    """One process fails in its own way; each notes what it raised."""

    def fail(*_: Any, **__: Any) -> Any:
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "disk":
            raise OSError(28, "No space left on device")
        raise RecipeError("Layer 'x': it cannot be.")

    if rank == which:
        owner: Any = checkpoint.ShardWriter if what == "disk" else recipes.ImportanceRecipe
        setattr(owner, "add" if what == "disk" else "solve", fail)
    try:
        work(rank, source, root, "importance_for_tests", {})
    except Exception as failure:
        (root / f"said-{rank}").write_text(f"{type(failure).__name__}: {failure}")
        raise SystemExit(2) from None


@pytest.mark.parametrize(
    ("which", "what", "said"),
    [
        (0, "recipe", "PeerError: Process 0 of 2 stopped: Layer 'x': it cannot be."),
        (1, "recipe", "PeerError: Process 1 of 2 stopped: Layer 'x': it cannot be."),
        (0, "disk", "PeerError: Process 0 of 2 stopped: [Errno 28] No space left on device"),
        (1, "dies", "PeerError: A process of this job died ("),
    ],
)
def test_when_one_fails_all_end(which: int, what: str, said: str, dense: Path, tmp_path: Path) -> None:
    codes = side_by_side(2, failing, dense, tmp_path, which, what)
    assert codes[1 - which] == 2 and codes[which] == (2 if what != "dies" else -signal.SIGKILL)
    assert (tmp_path / f"said-{1 - which}").read_text().startswith(said)
    assert not (tmp_path / "out").exists()


def few(rank: int, source: Path, root: Path) -> None:
    try:
        compress(source, root / "out", data=tokens(rows=1))
    except RarefyError as failure:
        (root / f"said-{rank}").write_text(str(failure))


def test_more_processes_than_samples(dense: Path, tmp_path: Path) -> None:
    assert side_by_side(2, few, dense, tmp_path) == [0, 0]
    assert "1 calibration samples cannot be shared by 2 processes; use more" in (tmp_path / "said-0").read_text()


def test_torchrun_speaks_with_one_voice(dense: Path, tmp_path: Path) -> None:
    """The command line, also for a recipe that needs no data, which one process does while the others wait."""
    (tmp_path / "text.txt").write_text("a b c d e f g h i j k l " * 30)
    code = "from tests.calibration import recipes; from rarefy.cli import app; app()"
    (tmp_path / "command.py").write_text(code)
    (tmp_path / "job.yaml").write_text("name: job\nrules: [{method: gram_for_tests}]\n")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "command.py"]
    line += ["compress", str(dense), "--out", "small", "--recipe", "job.yaml", "--data", "text.txt"]
    line += ["--samples", "6", "--seq-len", "12", "--device", "cpu"]
    done = subprocess.run(
        line, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits/weight") == 1 and done.stderr.count("plan: ") == 1
    assert (tmp_path / "small" / "rarefy.safetensors").is_file()


def test_layers_are_packed_by_their_cost() -> None:
    assert Ranks(0, 2).share([5.0, 1.0, 1.0, 1.0, 1.0]) == [0, 1, 1, 1, 1]
    assert Ranks(1, 3).share([1.0, 1.0, 1.0]) == [0, 1, 2]
    assert Ranks().share([3.0, 2.0]) == [0, 0]
