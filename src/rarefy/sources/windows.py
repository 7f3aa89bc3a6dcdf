"""Tokens, and tokens cut into windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rarefy.core.errors import OptionError

if TYPE_CHECKING:
    import torch


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """The tokens of the whole ``text``: LongTensor [N], without special tokens and however long."""
    import torch

    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def begin_token(tokenizer: Any) -> int | None:
    """The BOS token, if the tokenizer puts one in front of a text, as those of models trained with one do."""
    bos = tokenizer.bos_token_id
    first = tokenizer("a")["input_ids"][:1]
    return int(bos) if bos is not None and first == [bos] else None


def windows(tokens: torch.Tensor, context: int, count: int | None, bos: int | None) -> torch.Tensor:
    """The first ``count`` windows (all when None) of ``tokens`` (LongTensor [N]): LongTensor [count, context].

    Windows do not overlap and leave nothing out: window i holds tokens ``[i * context, (i + 1) * context)``. With
    ``bos`` each starts with that token, followed by the next ``context - 1`` tokens of the text. A rest at the end
    that fills no window is dropped. Raises OptionError when the text is too short for one or for ``count``.
    """
    import torch

    if context < 2:
        raise OptionError(f"A context of {context} tokens predicts nothing; use 2 or more.")
    if count is not None and count < 1:
        raise OptionError(f"{count} windows measure nothing; use 1 or more.")
    stride = context if bos is None else context - 1
    available = tokens.numel() // stride
    if available < (count or 1):
        wanted = "one window" if count in (None, 1) else f"{count} windows"
        raise OptionError(
            f"The text has {tokens.numel()} tokens, too few for {wanted} of {context}; "
            + (f"ask for at most {available} windows or a longer text." if available else "use a shorter context.")
        )
    body = tokens[: (count or available) * stride].reshape(-1, stride)
    if bos is None:
        return body
    return torch.cat([torch.full((body.shape[0], 1), bos, dtype=body.dtype, device=body.device), body], dim=1)
