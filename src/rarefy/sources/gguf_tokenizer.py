"""A fast tokenizer rebuilt from a GGUF file's metadata: byte-level BPE, and SentencePiece BPE.

It is rebuilt here rather than by Transformers, whose releases differ: some add tokens beyond the vocabulary, swap
the end and begin tokens, or split digits otherwise than the model was trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.core.errors import SourceError, UnsupportedError
from rarefy.core.files import write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer, pre_tokenizers

CONTROL, USER_DEFINED = 3, 4
# How text is cut before merging, as the models' own tokenizer files state it.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {
    "llama-bpe": LLAMA3_SPLIT, "llama3": LLAMA3_SPLIT, "llama-v3": LLAMA3_SPLIT,
    "qwen2": QWEN2_SPLIT, "deepseek-r1-qwen": QWEN2_SPLIT,
}
DIGITS_APART = ("smollm", "starcoder", "refact")
# The vocabulary wins over the merges: a word that is a token is never built from pieces.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
KINDS = ("gpt-2", *DIGITS_APART, *SPLITS)


def write_tokenizer(folder: Path, fields: Mapping[str, Any], max_tokens: int, file_name: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja (where there is a template) to ``folder``.

    ``max_tokens`` is the context the model was trained with. Raises UnsupportedError for a kind of tokenizer that
    cannot be rebuilt, SourceError for contradictory metadata.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or len(set(tokens)) != len(tokens):
        raise SourceError(f"'{file_name}' lacks a vocabulary of distinct tokens; get the file again.")
    special = {
        role: _token(tokens, fields, key, file_name)
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    tokenizer = _build(tokens, fields, special["unk"], file_name)
    kinds = fields.get("tokenizer.ggml.token_type", [])
    _add_tokens(tokenizer, tokens, kinds, special)
    _add_bos(tokenizer, fields, special["bos"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
    }
    config |= {f"{role}_token": token for role, token in special.items() if token is not None}
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if template := fields.get("tokenizer.chat_template"):
        write_text(folder / "chat_template.jinja", template)


def _token(tokens: Sequence[str], fields: Mapping[str, Any], key: str, file_name: str) -> str | None:
    number = fields.get(f"tokenizer.ggml.{key}_token_id")
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise SourceError(f"'{file_name}' has a {key} token outside its vocabulary; get the file again.")
    return tokens[number]


def _build(tokens: Sequence[str], fields: Mapping[str, Any], unknown: str | None, file_name: str) -> Tokenizer:
    model, kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if model == "llama":
        return _sentencepiece(tokens, fields, unknown, file_name)
    if model != "gpt2":
        raise UnsupportedError(
            f"'{file_name}' has tokenizer model '{model}', which cannot be rebuilt (known: gpt2, llama); "
            "use the safetensors release of this model."
        )
    if kind not in KINDS:
        raise UnsupportedError(
            f"'{file_name}' cuts text by the rule '{kind}', which is not known (known: {', '.join(KINDS)}); "
            "use the safetensors release of this model."
        )
    return _byte_level(tokens, fields, kind, file_name)


def _byte_level(tokens: Sequence[str], fields: Mapping[str, Any], kind: str, file_name: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if not all(len(pair) == 2 and {*pair, "".join(pair)} <= vocabulary.keys() for pair in merges):
        raise SourceError(f"'{file_name}' has merges that do not fit its vocabulary; get the file again.")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind in WHOLE_WORDS))
    if SPLITS.get(kind) == QWEN2_SPLIT:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _cutter(kind)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _cutter(kind: str) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    if kind in SPLITS:
        cut = pre_tokenizers.Split(Regex(SPLITS[kind]), behavior="isolated")
        return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    return words


def _sentencepiece(tokens: Sequence[str], fields: Mapping[str, Any], unknown: str | None, file_name: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or unknown is None:
        raise SourceError(f"'{file_name}' lacks the scores or the unknown token of its vocabulary; get the file again.")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = merges_by_score(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges_by_score(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to build a token from two tokens, best token first: SentencePiece joins the neighbours whose union
    scores highest, and so does a list of merges in this order."""
    merges = [
        (-scores[number], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token, number in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_tokens(
    tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int], special: Mapping[str, str | None]
) -> None:
    from tokenizers import AddedToken

    control = {token for token, kind in zip(tokens, kinds, strict=False) if kind == CONTROL}
    control |= {token for token in special.values() if token is not None}
    # In the order of the vocabulary, so that the file is the same every time.
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in tokens if t in control])
    whole = {token for token, kind in zip(tokens, kinds, strict=False) if kind == USER_DEFINED} - control
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens if token in whole])


def _add_bos(tokenizer: Tokenizer, fields: Mapping[str, Any], bos: str | None) -> None:
    from tokenizers import processors

    # Files from before the switch existed: SentencePiece models and Llama 3 were trained with one.
    usual = fields.get("tokenizer.ggml.model") == "llama" or fields.get("tokenizer.ggml.pre") in WHOLE_WORDS
    if bos is None or not fields.get("tokenizer.ggml.add_bos_token", usual):
        return
    start = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = start
