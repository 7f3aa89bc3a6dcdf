"""Every error a user can meet: one sentence that names the tensor, layer or option and says what to do next."""

from __future__ import annotations


class RarefyError(Exception):
    """Base of all expected failures; the command line prints the sentence and exits with code 2."""


class OptionError(RarefyError):
    """An option or argument has a value that cannot be used."""


class SourceError(RarefyError):
    """A model or a text is missing, unreadable, gated or not what was asked for."""


class FormatError(RarefyError):
    """A tensor or a number cannot be represented, or stored tensors contradict their own description."""


class CheckpointError(RarefyError):
    """A rarefy checkpoint is damaged, incomplete, of an unknown version or does not fit its model."""


class RecipeError(RarefyError):
    """A recipe is unknown, malformed, or asks for what a layer cannot give."""


class UnsupportedError(RarefyError):
    """The request is well formed, but this model, machine or format cannot serve it."""


def first_line(failure: Exception) -> str:
    """What another library's error says, for the inside of a sentence: its first line, or its class."""
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0].rstrip(".")
