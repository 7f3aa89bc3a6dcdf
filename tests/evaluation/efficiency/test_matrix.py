"""Costs add up, every combination has its row, and what was finished is not measured again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from rarefy.core.errors import OptionError, SourceError
from rarefy.evaluation.candidates import Candidate
from rarefy.evaluation.efficiency.matrix import Efficiency, Matrix, read_matrix, run_matrix
from rarefy.evaluation.efficiency.measure import Load, measure_cost, weight_bytes, work_of
from rarefy.evaluation.efficiency.roof import Roof
from rarefy.evaluation.protocol import Protocol
from rarefy.evaluation.results import Comparison, Evaluation, Sizes
from tests.caches import perfect_cache

CPU = torch.device("cpu")
ROOF = Roof(bytes_per_second=1e10, flops_per_second=1e11, dtype="float32")
LOAD = Load(batch=2, prompt_tokens=8, new_tokens=4, rounds=3, warm=1)
Build = Callable[..., Any]


def test_costs_agree_with_each_other(tiny: Build) -> None:
    model = tiny()
    cost = measure_cost(model, LOAD, ROOF, watts=5)
    assert cost.new_tokens_per_second * cost.token.mean / LOAD.batch == pytest.approx(1)
    assert cost.prompt_tokens_per_second * cost.first_token.mean / (LOAD.batch * LOAD.prompt_tokens) == pytest.approx(1)
    assert 0 < cost.token.p50 <= cost.token.p95 and 0 < cost.first_token.p50 <= cost.first_token.p95
    request = cost.first_token.mean + (LOAD.new_tokens - 1) * cost.token.mean
    assert cost.requests_per_second == pytest.approx(LOAD.batch / request)
    # Keys and values of 2 layers, 2 heads of 8, float32; the last token is not read again.
    assert cost.cache_bytes == 2 * 2 * 2 * 8 * 4 * LOAD.batch * (8 + 4 - 1)
    assert cost.weight_bytes == sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    assert cost.energy is not None and cost.joules_per_token is not None
    assert cost.joules_per_token * LOAD.batch * LOAD.new_tokens * LOAD.rounds == pytest.approx(cost.energy.joules)
    for share in (cost.compute_utilization, cost.prefill_roofline, cost.decode_roofline):
        assert share is not None and 0 < share < 1


def test_work_is_counted_from_the_layers(tiny: Build) -> None:
    model = tiny()
    work = work_of(model)
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    assert work is not None and work.flops == 2 * linear and work.head_flops == 2 * 32 * 97
    assert work.attention_flops == 4 * 32 * 2
    assert work.read_bytes == weight_bytes(model) - 97 * 32 * 4  # a step looks up one row of the embeddings
    tied = tiny(tie_word_embeddings=True)
    read = work_of(tied)
    assert read is not None and read.read_bytes == weight_bytes(tied)


def test_experts_make_work_depend_on_the_token() -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    cost = measure_cost(model, Load(prompt_tokens=4, new_tokens=2, rounds=1, warm=0), ROOF)
    assert cost.compute_utilization is None and cost.decode_roofline is None and cost.new_tokens_per_second > 0


class Loaded:
    """A candidate in a folder, and how often it was loaded."""

    def __init__(self, model: Any):
        self._model, self.count = model, 0

    def candidate(self, name: str) -> Candidate:
        sizes = Sizes(bits_per_weight={"total": 4.0}, stored_bytes=100, dense_bytes=400)
        return Candidate(name, load=self._load, identity=f"{name} on disk", sizes=sizes)

    def _load(self) -> Any:
        self.count += 1
        return self._model


def test_every_combination_has_a_row_and_is_measured_once(tiny: Build, tmp_path: Path) -> None:
    matrix = Matrix(
        models=("a", "b"), caches=("dense", "own"), batches=(1, 2), prompt_tokens=(4, 8), new_tokens=2, rounds=1
    )
    loaded = Loaded(tiny())
    caches = {"dense": None, "own": perfect_cache}

    def go() -> Efficiency:
        candidates = [loaded.candidate(name) for name in matrix.models]
        return run_matrix(matrix, candidates, caches, CPU, work_dir=tmp_path)

    first = go()
    rows = [(row.model, row.cache, row.cost.load.prompt_tokens, row.cost.load.batch) for row in first.rows]
    assert len(set(rows)) == len(rows) == 2 * 2 * 2 * 2 and loaded.count == 2
    assert {row.compression_ratio for row in first.rows} == {4.0} and first.rows[0].compression_rate is None
    assert go() == first and loaded.count == 2
    sorted(tmp_path.iterdir())[0].unlink()
    assert [row.model for row in go().rows] == [row.model for row in first.rows] and loaded.count == 3


def test_quality_is_that_of_the_model_with_its_cache_and_attention(tiny: Build) -> None:
    matrix = Matrix(
        models=("a",), caches=("dense", "own"), attention=("dense", "half"), new_tokens=2, prompt_tokens=(4,), rounds=1,
        windows=1,
    )  # fmt: skip
    set_on: list[str] = []

    def judge(model: str, cache: str, factory: Any, attention: str) -> Comparison:
        def evaluation(perplexity: float) -> Evaluation:
            return Evaluation(
                model=model, perplexity=perplexity, nll=1, kl=0.1, top1_agreement=None, tokens=1,
                protocol=Protocol(context=8, windows=1), bits_per_weight=None, stored_bytes=None, dense_bytes=None,
                seconds=1, tokens_per_second=1, peak_bytes=1,
            )  # fmt: skip

        found = (20 if cache == "dense" else 40) * (1 if attention == "dense" else 2)
        return Comparison(candidates=[evaluation(found)], reference=evaluation(10), passes=1)

    caches = {"dense": None, "own": perfect_cache}
    candidates = [Loaded(tiny()).candidate("a")]
    found = run_matrix(matrix, candidates, caches, CPU, attend=lambda model, name: set_on.append(name), judge=judge)
    assert [(row.attention, row.cache, row.quality_kept, row.compression_rate) for row in found.rows] == [
        ("dense", "dense", 0.5, 2.0), ("dense", "own", 0.25, 1.0), ("half", "dense", 0.25, 1.0),
        ("half", "own", 0.125, 0.5),
    ]  # fmt: skip
    assert set_on == ["half"]
    with pytest.raises(OptionError, match="give attend="):
        run_matrix(matrix, candidates, caches, CPU)
    assert found.protocol is not None and "context 8" in found.protocol


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("models: [", SourceError, "is not YAML"),
        ("just words", OptionError, "holds no options"),
        ("models: []", OptionError, "'models'"),
        ("{models: [a], bacthes: [1]}", OptionError, "did you mean 'batches'"),
        ("{models: [a], new_tokens: 1}", OptionError, "new_tokens"),
    ],
)
def test_a_wrong_matrix_is_named(content: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(content)
    with pytest.raises(error, match=message):
        read_matrix(tmp_path / "m.yaml")
    with pytest.raises(SourceError, match=r"none\.yaml"):
        read_matrix(tmp_path / "none.yaml")


def test_a_matrix_says_its_loads(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("models: [a]\nbatches: [1, 4]\nprompt_tokens: [16, 64]\nnew_tokens: 8\n")
    loads = read_matrix(tmp_path / "m.yaml").loads()
    assert [(load.prompt_tokens, load.batch) for load in loads] == [(16, 1), (16, 4), (64, 1), (64, 4)]
    assert loads[0].describe() == "batch 1, 16 + 8 tokens"
