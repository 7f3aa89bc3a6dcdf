"""Search for the number that gives a wanted result."""

from __future__ import annotations

import math
from collections.abc import Callable


def bisect_falling(
    function: Callable[[float], float], target: float, low: float, high: float, tolerance: float, steps: int = 16
) -> float:
    """The argument between ``low`` and ``high`` (both positive) at which a falling ``function`` is within ``tolerance``
    of ``target``, found by halving on a logarithmic scale; the nearest end when the target lies outside."""
    middle = math.sqrt(low * high)
    for _ in range(steps):
        middle = math.sqrt(low * high)
        found = function(middle)
        if abs(found - target) <= tolerance:
            break
        low, high = (middle, high) if found > target else (low, middle)
    return middle
