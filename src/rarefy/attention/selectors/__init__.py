"""Selectors: rules from scores to kept blocks."""

from rarefy.attention.selectors.base import Forced, Mass, Selector, Threshold, TopK

__all__ = ["Forced", "Mass", "Selector", "Threshold", "TopK"]
