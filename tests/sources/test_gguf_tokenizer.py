from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rarefy.sources.gguf import open_gguf
from rarefy.sources.gguf_tokenizer import merges_by_score, write_tokenizer
from rarefy.sources.windows import begin_token
from tests.sources.tiny_gguf import USER_DEFINED, tiny_model, write_gguf

SAMPLES = [
    "hello world",
    "hello  world\n\n12 123\t\u00e9\u65e5\u672c",
    " hello",
    "It's <|im_end|> and <think>12</think>",
]


def opened(tmp_path: Path, model_type: str = "llama", **fields: Any) -> Any:
    renamed = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    write_gguf(tmp_path / "tiny.gguf", tiny_model(model_type), fields=renamed)
    return AutoTokenizer.from_pretrained(open_gguf(tmp_path / "tiny.gguf").folder)


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_text_survives_the_round_trip(rule: str, tmp_path: Path, cache: Path) -> None:
    tokenizer = opened(tmp_path, pre=rule, add_bos_token=False)
    for sample in SAMPLES:
        tokens = tokenizer(sample)["input_ids"]
        assert tokenizer.decode(tokens) == sample
        assert max(tokens) < len(tokenizer)


def test_merges_specials_and_digits(tmp_path: Path, cache: Path) -> None:
    tokenizer = opened(tmp_path)
    assert tokenizer.tokenize("hello world") == ["hello", "Ġworld"]
    assert tokenizer.tokenize("a12") == ["a", "1", "2"], "this model reads digits one by one"
    assert tokenizer.tokenize(f"a<|im_end|>{USER_DEFINED}") == ["a", "<|im_end|>", USER_DEFINED]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>",
    )
    assert tokenizer.decode(tokenizer("hello<|im_end|>")["input_ids"], skip_special_tokens=True) == "hello"


def test_numbers_stay_whole_where_the_model_reads_them_so(tmp_path: Path, cache: Path) -> None:
    assert opened(tmp_path, pre="gpt-2").tokenize("a12") == ["a", "12"]


def test_qwen_text_is_composed_first(tmp_path: Path, cache: Path) -> None:
    tokenizer = opened(tmp_path, "qwen2")
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"add_bos_token": True}, 1),
        ({"pre": "llama-bpe"}, 1),
        ({"pre": "llama-bpe", "add_bos_token": False}, None),
    ],
)
def test_the_begin_token_follows_the_file(
    fields: dict[str, Any], expected: int | None, tmp_path: Path, cache: Path
) -> None:
    assert begin_token(opened(tmp_path, **fields)) == expected


def test_sentencepiece_joins_by_score(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a"]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [-9.0, -9.0, -9.0, -9.0, -3.0, -1.0, -4.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    write_tokenizer(tmp_path, fields, 128, "tiny.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    # "bc" scores best, then "▁a"; "ab" never gets its chance.
    assert tokenizer.tokenize("abc") == ["▁a", "bc"]
    assert tokenizer.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert begin_token(tokenizer) == 1
    for sample in ("abc abc", " ab", "a\u00e9\n b"):
        assert tokenizer.decode(tokenizer(sample, add_special_tokens=False)["input_ids"]) == sample


def test_merges_come_best_first() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}
    assert merges_by_score(vocabulary, [0, 0, -2.0, -1.0, -3.0]) == [
        ("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a"),
    ]
