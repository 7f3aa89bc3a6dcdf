"""Loggers under ``rarefy``; notices go to stderr, results alone go to stdout."""

from __future__ import annotations

import logging


def logger(name: str) -> logging.Logger:
    """The logger ``rarefy.<name>`` (``name`` may be a module's ``__name__``)."""
    return logging.getLogger(name if name.split(".")[0] == "rarefy" else f"rarefy.{name}")
