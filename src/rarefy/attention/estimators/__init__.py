"""Estimators: cheap scores of blocks of keys, and the two bounds for them."""

from rarefy.attention.estimators.base import Estimator, grouped, query_blocks
from rarefy.attention.estimators.simple import Even, Nearness, Noise, TrueMass, true_blocks

__all__ = ["Estimator", "Even", "Nearness", "Noise", "TrueMass", "grouped", "query_blocks", "true_blocks"]
