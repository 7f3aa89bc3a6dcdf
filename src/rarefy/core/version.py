"""The version of this package, for every room that has to state it."""

__version__ = "0.1.0"
