"""What every kind of model source turns into: a folder that Transformers can load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine: ``folder`` holds config.json, safetensors and, where the source has one, a tokenizer.

    ``name`` is for tables; ``note`` is one line for reports that says what the dense reference is.
    """

    name: str
    folder: Path
    note: str
