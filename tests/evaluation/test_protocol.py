from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rarefy.core.config import parse
from rarefy.core.devices import fast_dtype
from rarefy.core.errors import OptionError
from rarefy.evaluation.protocol import Protocol, bos_token
from rarefy.sources.windows import tokenize, windows


def tokenizer(template: str | None, bos: bool = True) -> PreTrainedTokenizerFast:
    """A word tokenizer whose template may put ``<s>`` (token 1) in front or ``</s>`` (token 2) behind."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{letter: index + 3 for index, letter in enumerate("abcdefgh")}}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    if template is not None:
        model.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>", **names)


@pytest.mark.parametrize(
    ("template", "asked", "token"),
    [
        ("<s> $A", None, 1),
        ("<s> $A </s>", None, 1),
        ("<s> $A", False, None),
        ("$A </s>", None, None),
        (None, None, None),
        (None, True, 1),
        ("$A </s>", True, 1),
    ],
)
def test_bos_is_what_the_model_was_trained_with_unless_told(
    template: str | None, asked: bool | None, token: int | None
) -> None:
    assert bos_token(tokenizer(template), asked) == token


def test_bos_that_does_not_exist_is_refused() -> None:
    assert bos_token(tokenizer("$A </s>", bos=False), None) is None
    with pytest.raises(OptionError, match="has no BOS token"):
        bos_token(tokenizer("$A </s>", bos=False), True)


def test_windows_of_a_text_get_bos_in_front_and_lose_the_rest() -> None:
    letters = tokenizer("<s> $A </s>")
    tokens = tokenize(letters, "a b c d e f g h a b c")
    with_bos = windows(tokens, 4, None, bos_token(letters, None))
    assert with_bos.tolist() == [[1, 3, 4, 5], [1, 6, 7, 8], [1, 9, 10, 3]]
    assert windows(tokens, 4, None, bos_token(letters, False)).tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]


def test_protocols_read_as_one_line() -> None:
    done = Protocol(context=512, windows=12, bos=False, dtype="float32", text="wiki.test.raw", form="hf-join")
    assert done.describe() == "context 512, 12 windows, no BOS, float32, wiki.test.raw (hf-join)"
    assert Protocol(windows=None).describe() == "context 512, whole text, BOS as trained, dtype as loaded"
    fast = Protocol(context=8, windows=1, bos=True, executor="fast").describe()
    assert fast == "context 8, 1 window, BOS in front of every window, dtype as loaded, fast execution"


@pytest.mark.parametrize("bad", [{"context": 1}, {"windows": 0}, {"stride": 5}, {"executor": "loose"}])
def test_bad_protocols_name_the_key(bad: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(bad))):
        parse(Protocol, bad, "The protocol", OptionError)


def test_fast_dtype_runs_here() -> None:
    dtype = fast_dtype("cpu")
    assert dtype in (torch.float32, torch.bfloat16)
    assert fast_dtype(torch.device("meta")) == torch.float32
