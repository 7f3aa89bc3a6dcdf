"""What is chosen for a product: from tables where somebody measured, else by a rule that every size obeys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rarefy.core.errors import UnsupportedError
from rarefy.kernels.cuda import driver, measure, tuning
from rarefy.kernels.cuda.code import Code
from rarefy.kernels.cuda.linear import most_tokens
from rarefy.kernels.cuda.prepared import CODES as KIND
from rarefy.kernels.cuda.program import SOURCE, Tuning, tiles

CODES = [
    Code(4, 128), Code(3, 128, outliers=torch.float16), Code(4, 128, zero=torch.uint8), Code(3, 16, span=4),
    Code(1, 256), Code(8, 0, span=16), Code(4, table="shared"), Code(7, 128),
]  # fmt: skip
GPU = torch.device("cuda", 0)
CAPABILITY = (9, 0)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "package")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY)
    tuning.table.cache_clear()
    tuning._chosen.cache_clear()
    tuning._name.cache_clear()


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_the_rule_and_all_candidates_can_run(code: Code, capability: tuple[int, int]) -> None:
    for tokens in tuning.BUCKETS:
        chosen = tuning.by_rule(code, 4096, 14336, tokens, capability)
        tried = list(measure.candidates(code, tokens, capability == (9, 0), 14336))
        assert tried and len(set(tried)) == len(tried)
        for each in (chosen, *tried):
            assert each.shared_memory(code) <= tuning.MOST_SHARED_WIDE and each.threads <= 1024
            assert tuning.can_be_stored(code, each, 14336)
            assert each.suits(code) and 8 * each.tokens * 16 >= tokens
            assert not (each.wide and (each.across % 4 or not each.stages))
        assert chosen.wide == (capability == (9, 0) and tokens > 16) and chosen.overlap == (capability >= (9, 0))


def test_measured_entries_are_found_and_kept() -> None:
    code, small, large = Code(4, 128), Tuning(1, 1, 1, 4), Tuning(4, 1, 2, 8)
    entries = [tuning.entry(code, 4096, 4096, 1, small), tuning.entry(code, 14336, 4096, 1, large)]
    path = tuning.keep(entries, GPU)
    assert path.name == "some-gpu.json" and tuple(json.loads(path.read_text())["capability"]) == CAPABILITY
    assert tuning.choose(code, 4096, 4096, 1, GPU) == small and tuning.choose(code, 28672, 4096, 1, GPU) == large
    assert tuning.choose(code, 4096, 4096, 16, GPU) == tuning.by_rule(code, 4096, 4096, 16, CAPABILITY)
    tuning.keep([tuning.entry(code, 4096, 4096, 1, large)], GPU)  # measured again
    assert tuning.choose(code, 4096, 4096, 1, GPU) == large and len(json.loads(path.read_text())["entries"]) == 2


def test_what_was_measured_of_another_code_is_made_to_fit() -> None:
    measured = Tuning(1, 4, 4, 1, 4, 8, wide=True)
    tuning.keep([tuning.entry(Code(3, 128), 4096, 4096, 32, measured)], GPU)
    small, outliers = Code(3, 16, span=4), Code(3, 128, outliers=torch.float16)
    assert tuning.choose(Code(3, 128), 4096, 4096, 32, GPU) == measured
    assert tuning.choose(small, 4096, 4096, 32, GPU).depth == 1  # or a program that takes long to compile
    assert tuning.choose(outliers, 4096, 4096, 32, GPU) == tuning.by_rule(outliers, 4096, 4096, 32, CAPABILITY)
    own = Tuning(1, 4, 8, 1, 2, 5, wide=True)  # measured with outliers
    tuning.keep([tuning.entry(outliers, 4096, 4096, 32, own)], GPU)
    assert tuning.choose(outliers, 4096, 4096, 32, GPU).across == 8
    assert tuning.choose(Code(3, 128), 4096, 4096, 32, GPU).across == 4


def test_tables_of_other_gpus_of_the_same_capability_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, own, other = Code(4, 128), Tuning(1, 1, 1, 4), Tuning(4, 1, 2, 8)
    for name, entries in {
        "some-gpu": [tuning.entry(code, 4096, 4096, 1, own)],
        "another": [tuning.entry(code, 4096, 4096, 1, other), tuning.entry(code, 65536, 4096, 1, other)],
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"capability": CAPABILITY, "entries": entries}))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    assert tuning.choose(code, 4096, 4096, 1, GPU) == own and tuning.choose(code, 65536, 4096, 1, GPU) == other


def test_measurements_of_the_same_groups_and_zeros_come_first() -> None:
    grouped, plain, zeros = Code(4, 64, table="shared"), Code(4, table="shared"), Code(4, 64, zero=torch.float16)
    of_grouped, of_plain = Tuning(1, 1, 1, 8), Tuning(2, 1, 1, 8)
    tuning.keep([tuning.entry(grouped, 4096, 4096, 1, of_grouped), tuning.entry(plain, 4096, 4096, 1, of_plain)], GPU)
    assert tuning.choose(grouped, 4096, 4096, 1, GPU) == of_grouped
    assert tuning.choose(plain, 4096, 4096, 1, GPU) == of_plain
    assert tuning.choose(zeros, 4096, 4096, 1, GPU) == tuning.by_rule(zeros, 4096, 4096, 1, CAPABILITY)  # no table
    tuning.keep([tuning.entry(Code(4, 128), 4096, 4096, 1, of_plain)], GPU)
    assert tuning.choose(zeros, 4096, 4096, 1, GPU) == of_plain  # better than none


def test_what_was_measured_for_some_tokens_serves_others() -> None:
    """Of whom a block holds as many as there may be, or none where it has no room for all."""
    code = Code(3, 16, span=4, scale="bilevel").with_outliers(torch.float16, 4096, 5)
    longer, measured = code.with_outliers(torch.float16, 14336, 17), Tuning(1, 1, 2, 4, 2, held=4)
    tuning.keep([tuning.entry(code, 8192, 8192, 4, measured)], GPU)
    found = [tuning.choose(code, 8192, 8192, tokens, GPU) for tokens in (2, 3, 4, 7)]
    assert found == [replace(measured, held=held) for held in (2, 4, 4, 8)]
    assert [each.beside(code) for each in found] == [4, 2, 2, 1]
    assert tuning.choose(longer, 8192, 8192, 4, GPU).held == 4 and tuning.choose(longer, 8192, 8192, 8, GPU).held == 0
    assert tuning.choose(code, 8192, 8192, 16, GPU) == tuning.by_rule(code, 8192, 8192, 16, CAPABILITY)


@pytest.mark.parametrize(("rows", "most"), [(8192, 1024), (8208, 768)])
def test_small_groups_and_many_rows_are_dequantized_sooner(rows: int, most: int) -> None:
    numbers = {"kind": KIND, "rows": rows}
    found = [most_tokens([({}, {**numbers, "group_size": size}, 1.0)], GPU) for size in (0, 16, 32, 128)]
    assert found == [most, 64, 64, most]


@pytest.mark.parametrize("code", [code for code in CODES if code.outliers is None], ids=str)
def test_the_rule_for_prompts_can_run(code: Code) -> None:
    for rows, columns in ((1, 64), (4096, 4096), (4096, 14336), (28672, 4096)):
        for tokens in (257, 384, 512, 1100, 1536):
            chosen = tuning.of_prompt(code, rows, columns, tokens, 132)
            assert chosen.shared_memory(code) <= tuning.MOST_SHARED_WIDE and chosen.stages > 2 and chosen.unpackers
            blocks, whole, longest = tiles(chosen, rows, tokens, 132)
            assert blocks > 0 and whole >= 0 and longest > 0 and (chosen.split > 1 or blocks <= 132)


def test_a_last_wave_is_taken_in_halves() -> None:
    """448 tiles for 132 blocks are three waves and 52 tiles, whose halves are less than a wave."""
    blocks, whole, longest = tiles(Tuning(2, 32, wide=True, unpackers=1), 14336, 1024, 132)
    assert (blocks, whole) == (132, 396) and longest < 4


def test_a_table_of_the_same_capability_serves(tmp_path: Path) -> None:
    code, own = Code(4, 128), Tuning(1, 1, 1, 16)
    folder = tmp_path / "package"
    folder.mkdir()
    for name, capability in (("a", [8, 0]), ("b", [9, 0])):
        data = {"capability": capability, "entries": [tuning.entry(code, 4096, 4096, 1, own)]}
        (folder / f"{name}.json").write_text(json.dumps(data))
    assert tuning.choose(code, 4096, 4096, 1, GPU) == own


def test_the_tables_of_the_package_can_be_read() -> None:
    paths = list(Path(tuning.__file__).with_name("tables").glob("*.json"))
    assert paths
    for path in paths:
        data = json.loads(path.read_text("utf-8"))
        assert len(data["capability"]) == 2
        places = [tuple(entry.get(key, False) for key in tuning.KEY) for entry in data["entries"]]
        assert len(set(places)) == len(places) and all(Tuning(**entry["tuning"]) for entry in data["entries"])


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build brings the compiler along")
def test_what_is_missing_is_said() -> None:
    with pytest.raises(UnsupportedError, match="run-time compiler"):
        driver.compiled(SOURCE, CAPABILITY, [])
