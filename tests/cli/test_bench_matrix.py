"""A matrix from its file to the table and the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from rarefy.cli.bench_matrix import bench_matrix
from rarefy.contracts import kv_recipes
from rarefy.core.errors import OptionError, RarefyError
from rarefy.integrations.transformers.kv_evaluation import cache_factory
from rarefy.reporting.findings import read_findings
from tests.cli.conftest import Run, one_json, one_sentence
from tests.processes import fresh_process

PLAN = "random:density=0.3,dense_below=0,block_q=8,block_k=8,max_density=1"


def test_a_matrix_becomes_a_table_and_a_result(run: Run, models: Path, text: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(
        f"models: ['{models / 'llama'}', '{models / 'small'}']\nreference: '{models / 'llama'}'\nbatches: [1]\n"
        "caches: [dense, 'kivi:num_bits=4,group_size=8,residual=8']\n"
        f"attention: [dense, '{PLAN}']\n"
        f"prompt_tokens: [8]\nnew_tokens: 2\nrounds: 1\nwindows: 1\ncontext: 16\ndata: '{text}'\n"
        "device: cpu\nwatts: 5\n"
    )
    done = run("bench", "--matrix", matrix, "--work-dir", tmp_path / "work")
    assert done.exit_code == 0, done.stderr
    table = done.stdout
    for words in ("llama", "small", "1 x 8+2", "kivi:num_bits", "roof: ", "energy: modelled", "perplexity: context 16"):
        assert words in table
    again = run("bench", "--matrix", matrix, "--work-dir", tmp_path / "work", "--json")
    assert one_json(again)["kind"] == "efficiency"
    (tmp_path / "result.json").write_text(again.stdout)
    (found,) = read_findings([tmp_path / "result.json"]).efficiency
    dense, coded, sparse, both, small, *_ = found.rows
    assert (sparse.attention, sparse.cache) == (PLAN, "dense") and both.attention == PLAN and both.cache == coded.cache
    assert sparse.kl is not None and both.kl is not None and both.kl > 0 < sparse.kl
    assert coded.cache.startswith("kivi") and coded.perplexity is not None
    assert dense.quality_kept == pytest.approx(1) and dense.compression_ratio == pytest.approx(1)
    assert small.compression_ratio is not None and small.compression_ratio > 1 and small.perplexity != dense.perplexity


def test_what_cannot_be_measured_is_named(run: Run, models: Path, tmp_path: Path) -> None:
    assert "one of the two" in one_sentence(run("bench"))
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(f"models: ['{models / 'llama'}']\ncaches: [tape]\n")
    with pytest.raises(RarefyError, match="'tape'"):
        bench_matrix(matrix)
    matrix.write_text(f"models: ['{models / 'llama'}']\nattention: [orakle]\n")
    with pytest.raises(RarefyError, match="did you mean 'oracle'"):
        bench_matrix(matrix)
    matrix.write_text(f"models: ['{models / 'llama'}']\nwindows: 2\n")
    with pytest.raises(OptionError, match="name it as 'reference'"):
        bench_matrix(matrix)


def open_unknown() -> None:
    assert "kivi" not in kv_recipes
    cache_factory("kivi", None)


def test_caches_are_known_in_a_process_that_has_used_none() -> None:
    assert fresh_process(open_unknown) == 0
