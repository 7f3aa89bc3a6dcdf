"""Estimators: cheap scores of blocks of keys, and the two bounds for them."""

from rarefy.attention.estimators.base import Estimator, grouped, query_blocks
from rarefy.attention.estimators.pooled import Extremes, PooledMeans
from rarefy.attention.estimators.sampled import Antidiagonals, Lines
from rarefy.attention.estimators.simple import Even, Nearness, Noise, TrueMass, true_blocks

__all__ = [
    "Antidiagonals", "Estimator", "Even", "Extremes", "Lines", "Nearness", "Noise", "PooledMeans", "TrueMass",
    "grouped", "query_blocks", "true_blocks",
]  # fmt: skip
