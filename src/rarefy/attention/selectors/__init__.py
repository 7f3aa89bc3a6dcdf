"""Selectors: rules from scores to kept blocks."""

from rarefy.attention.selectors.base import Forced, Mass, Selector, Threshold, TopK
from rarefy.attention.selectors.fused import select_map

__all__ = ["Forced", "Mass", "Selector", "Threshold", "TopK", "select_map"]
