"""The protocol of a perplexity: everything that has to be equal before two numbers may be compared."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rarefy.core.config import StrictModel
from rarefy.core.errors import OptionError
from rarefy.sources.windows import begin_token


class Protocol(StrictModel):
    """What is measured on. Perplexity = exp(total negative log-likelihood / predicted tokens), where the predicted
    tokens are positions 1 .. context-1 of windows that do not overlap.

    As a request, ``windows=None`` means the whole text, ``bos=None`` means "as the model was trained", and
    ``dtype=None`` means "as loaded". In a result all three say what was done. ``dtype`` is that of the forward pass;
    log-probabilities are always float32 and their sums float64. ``chunk``: how many tokens went through the model at a
    time, each reading the KV cache of those before; None means whole windows, which read no cache.
    """

    context: int = Field(default=512, ge=2)
    windows: int | None = Field(default=12, ge=1)
    bos: bool | None = None
    dtype: str | None = None
    text: str = ""
    form: str = ""
    executor: Literal["exact", "fast"] = "exact"
    chunk: int | None = Field(default=None, ge=1)

    def describe(self) -> str:
        """One line for tables, such as ``context 512, 12 windows, no BOS, float32, wiki.test.raw (hf-join)``."""
        parts = [
            f"context {self.context}",
            "whole text" if self.windows is None else f"{self.windows} window" + ("s" if self.windows != 1 else ""),
            {None: "BOS as trained", True: "BOS in front of every window", False: "no BOS"}[self.bos],
            self.dtype or "dtype as loaded",
        ]
        if self.text:
            parts.append(self.text + (f" ({self.form})" if self.form else ""))
        if self.chunk is not None:
            parts.append(f"in chunks of {self.chunk}")
        if self.executor != "exact":
            parts.append(f"{self.executor} execution")
        return ", ".join(parts)


def bos_token(tokenizer: Any, bos: bool | None) -> int | None:
    """The token to put in front of every window, or None.

    With ``bos=None`` the tokenizer decides: one that puts its BOS in front of a text belongs to a model that was
    trained so. Raises OptionError when ``bos=True`` and the tokenizer has none.
    """
    if bos is None:
        return begin_token(tokenizer)
    if not bos:
        return None
    if tokenizer.bos_token_id is None:
        raise OptionError("bos=True was asked for, but this model's tokenizer has no BOS token; leave it to 'auto'.")
    return int(tokenizer.bos_token_id)
