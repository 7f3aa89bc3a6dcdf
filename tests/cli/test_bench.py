"""``rarefy bench`` on models that fit in a page: what it measures, what it says, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rarefy.evaluation.speed import measure
from rarefy.integrations.peers import RunnerDecoder, TransformersDecoder, step_bytes
from rarefy.kernels import cpu
from tests.cli.conftest import Run, one_json, one_sentence
from tests.decoding.models import build_model, compress, prompt

SHORT = ("--prompt-tokens", 6, "--new-tokens", 3, "--rounds", 2)


def test_every_decoder_writes_the_same_tokens() -> None:
    model, tokens = build_model("qwen3"), prompt(8).tolist()
    ours, eager = RunnerDecoder(model, "exact"), TransformersDecoder(model, False, 64)
    for _ in range(2):  # beginning anew forgets the first time
        written = []
        for decoder in (ours, eager):
            first = decoder.start(tokens)
            written.append([first, *decoder.write(first, 5)])
        assert written[0] == written[1]


def test_bytes_of_a_step() -> None:
    tied, untied = build_model("llama_tied"), build_model("llama")
    numbers = sum(parameter.numel() for parameter in tied.parameters())
    assert step_bytes(tied) == 4 * numbers  # the embedding is read as the head
    assert step_bytes(untied) == 4 * numbers
    small = compress(untied)
    assert step_bytes(small) < 4 * 96 * 48 + (numbers - 96 * 48)  # a dense head, and less than a byte for the rest


class Clock:
    """A decoder that takes the time it is told."""

    executor, step_bytes, memory_bytes = "none", 1000, None

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def start(self, tokens: list[int]) -> int:
        self.log.append(self.name)
        return 0

    def write(self, token: int, count: int) -> list[int]:
        return [token + 1 + number for number in range(count)]


def test_turns_are_taken_and_the_first_row_is_the_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("rarefy.evaluation.speed.time.perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr("rarefy.evaluation.speed.read_bandwidth", lambda: 1e4)
    log: list[str] = []
    result = measure([Clock("a", log), Clock("b", log)], [1, 2], 5, 2)
    assert log == ["a", "b", "b", "a", "a", "b"]
    first = result.rows[0]
    assert first.prefill_tokens_per_second == 2.0 and first.decode_tokens_per_second == 5.0
    assert first.first_token_seconds == 1.0 and first.fraction_of_read == pytest.approx(1000 / 1e4 / 0.2)
    assert result.rows[1].decode_ratio == 1.0 and result.rounds == 2


def test_bench_as_json_and_as_a_table(run: Run, models: Path) -> None:
    record = one_json(run("bench", models / "small", "--against", f"hf-eager={models / 'llama'}", *SHORT, "--json"))
    ours, eager = record["rows"]
    assert record["kind"] == "speed" and record["threads"] == 1 and record["prompt_tokens"] == 6
    assert ours["name"] == "rarefy" and ours["executor"].startswith(("torch", "native")) and ours["decode_ratio"] == 1
    assert eager["name"] == "hf-eager" and eager["step_bytes"] > ours["step_bytes"]
    assert all(row[key] > 0 for row in (ours, eager) for key in ("decode_tokens_per_second", "fraction_of_read"))
    assert torch.get_num_threads() == 1
    result = run("bench", models / "small", *SHORT)
    assert result.exit_code == 0 and "decode tokens/s" in result.stdout and "GB/s" in result.stdout
    assert "computed by torch" not in result.stderr


def test_a_model_without_a_program_is_measured_through_transformers_and_says_so(run: Run, models: Path) -> None:
    result = run("bench", models / "gpt2", *SHORT)
    assert result.exit_code == 0 and "does not know the model class GPT2LMHeadModel" in result.stderr
    assert "transformers" in result.stdout


def test_weights_that_torch_computes_are_told(run: Run, models: Path, tmp_path: Path) -> None:
    if not cpu.available():
        pytest.skip("needs the native library, which refuses some weights")
    odd = ("--set", "num_bits=4", "--set", "group_size=10", "--device", "cpu")  # not a multiple of four
    assert run("compress", models / "llama", "--out", tmp_path / "odd", *odd).exit_code == 0
    said = run("bench", tmp_path / "odd", *SHORT).stderr
    assert "14 terms of weights are computed by torch, since no kernel here reads groups of 10 columns" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--against", "vllm"), "--against 'vllm' is unknown"),
        (("--against", "llama.cpp"), "needs a GGUF file"),
        (("--against", "llama.cpp=none.gguf"), "'none.gguf' is not there"),
        (("--dtype", "int4"), "--dtype 'int4' is unknown"),
        (("--prompt-tokens", 100), "do not fit the 64 positions"),
    ],
)
def test_bench_refuses(run: Run, models: Path, arguments: tuple[str, ...], says: str) -> None:
    assert says in one_sentence(run("bench", models / "small", *SHORT, *arguments))


def test_bench_refuses_what_does_not_write(run: Run, models: Path) -> None:
    assert "writes no text" in one_sentence(run("bench", models / "bert", *SHORT))
