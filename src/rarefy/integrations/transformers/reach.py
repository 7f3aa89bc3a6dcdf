"""From the masks of Transformers back to what they mean, once for all layers of a pass."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rarefy.attention.reach import Reach
from rarefy.core.errors import UnsupportedError

_ROWS = 1 << 24  # entries of a mask that are compared at once
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def reach_of(mask: Tensor | None, queries: int, keys: int, causal: bool, window: int | None) -> Reach:
    """What ``queries`` may see of ``keys`` by a mask ``[B, 1 or H, queries, keys]``: bool, or additive with 0 where
    they may. A mask of another kind is kept as it is. Raises UnsupportedError for additive masks that weigh keys."""
    if mask is None:
        # Left out of several queries, a mask is causal from the first key on: an empty buffer of fixed size follows.
        return _maskless(queries, keys, causal)
    key = (queries, keys, window)
    known = _known.get(mask)
    if known is not None and known[0] == key:
        return known[1]
    found = _recognized(_as_bool(mask), queries, keys, window)
    _known[mask] = (key, found)
    return found


@functools.lru_cache(maxsize=4)
def _maskless(queries: int, keys: int, causal: bool) -> Reach:
    return Reach(queries, keys, 0 if queries > 1 and causal else keys - queries, causal)


def _as_bool(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if bool((~seen & (mask > torch.finfo(mask.dtype).min / 2)).any()):
        raise UnsupportedError("This model adds a bias to attention scores, which a sparse plan cannot; use 'dense'.")
    return seen


def _recognized(mask: Tensor, queries: int, keys: int, window: int | None) -> Reach:
    mask = mask[..., :keys]
    explicit = Reach(queries, keys, keys - queries, mask=mask)
    if mask.shape[1] != 1:
        return explicit
    seen = mask[:, 0].any(1)
    place = torch.arange(keys, device=mask.device)
    first, stop = torch.where(seen, place, keys).amin(1), torch.where(seen, place + 1, 0).amax(1)
    end = int(stop.max())
    own_first = None if not int(first.max()) else first
    windows = [window] if window is not None and window < keys else []
    guesses = []
    # A buffer of fixed size is filled up to its newest token; right padding ends before the newest query.
    for offset in dict.fromkeys((end - queries, keys - queries)):
        own_stop = None if int(stop.min()) == keys else stop
        for width in (None, *windows):
            guesses.append(Reach(queries, keys, offset, True, width, own_first, own_stop))
    guesses.append(
        Reach(queries, keys, keys - queries, False, None, own_first, None if int(stop.min()) == keys else stop)
    )
    begins = mask[:, 0].to(torch.uint8).argmax(2)
    old = torch.where(place[: keys - queries] < begins[:, :1], -1, begins[:, :1])
    segment = torch.cat([old, begins], 1) if queries <= keys else begins
    if bool((segment.diff(dim=1) >= 0).all()) and segment.shape[1] == keys:
        guesses.extend(Reach(queries, keys, keys - queries, True, width, segment=segment) for width in (None, *windows))
    return next((guess for guess in guesses if _agrees(guess, mask)), explicit)


def _agrees(reach: Reach, mask: Tensor) -> bool:
    row = torch.arange(mask.shape[0], device=mask.device)[:, None, None]
    key = torch.arange(reach.keys, device=mask.device)
    at_once = max(1, _ROWS // (reach.keys * mask.shape[0]))
    # The last rows first: they tell most guesses apart.
    for low in reversed(range(0, reach.queries, at_once)):
        query = torch.arange(low, min(low + at_once, reach.queries), device=mask.device)[:, None]
        own = mask[:, 0, low : low + at_once]
        if not torch.equal(reach.allowed(row, query, key).expand(own.shape), own):
            return False
    return True
