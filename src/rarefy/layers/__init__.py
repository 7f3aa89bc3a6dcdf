"""nn modules that hold terms, and the swap that puts them into a model."""

from rarefy.layers.experts import CompressedStack
from rarefy.layers.linear import CompressedLinear
from rarefy.layers.view import CompressedWeight

__all__ = ["CompressedLinear", "CompressedStack", "CompressedWeight"]
