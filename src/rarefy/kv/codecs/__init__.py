"""Codecs: leaves that store numbers, and words that combine codecs."""

from rarefy.kv.codecs.composed import JoinedHeads, Partition, Permuted, Residual, Rotated, Trimmed, Turned
from rarefy.kv.codecs.corrections import LowRank, Sparse
from rarefy.kv.codecs.plain import Exact, Gridded
from rarefy.kv.codecs.tables import ChannelTable, NormTable, ProductTable, RangeTable

__all__ = [
    "ChannelTable", "Exact", "Gridded", "JoinedHeads", "LowRank", "NormTable", "Partition", "Permuted", "ProductTable",
    "RangeTable", "Residual", "Rotated", "Sparse", "Trimmed", "Turned",
]  # fmt: skip
