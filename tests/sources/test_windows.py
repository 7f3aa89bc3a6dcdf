from __future__ import annotations

import pytest
import torch

from rarefy.core.errors import OptionError
from rarefy.sources.windows import windows

TOKENS = torch.arange(23)


def test_windows_follow_each_other() -> None:
    cut = windows(TOKENS, 5, None, None)
    assert cut.shape == (4, 5)
    assert torch.equal(cut.flatten(), TOKENS[:20])
    assert torch.equal(windows(TOKENS, 5, 2, None), cut[:2])


def test_each_window_starts_with_bos() -> None:
    cut = windows(TOKENS, 5, 5, 99)
    assert cut.shape == (5, 5) and cut.dtype == torch.long
    assert (cut[:, 0] == 99).all()
    assert torch.equal(cut[:, 1:].flatten(), TOKENS[:20])


@pytest.mark.parametrize(
    ("context", "count", "bos", "part"),
    [
        (24, None, None, "has 23 tokens, too few for one window of 24"),
        (24, 1, None, "has 23 tokens"),
        (5, 5, None, "at most 4 windows"),
        (5, 6, 99, "at most 5 windows"),
        (1, None, None, "context of 1"),
        (5, 0, None, "0 windows"),
    ],
)
def test_a_short_text_is_refused(context: int, count: int | None, bos: int | None, part: str) -> None:
    with pytest.raises(OptionError, match=part):
        windows(TOKENS, context, count, bos)


def test_one_token_and_none() -> None:
    for tokens in (torch.arange(1), torch.arange(0)):
        with pytest.raises(OptionError, match="too few for one window"):
            windows(tokens, 512, None, None)
