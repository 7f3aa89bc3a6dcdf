"""A model's module tree without its weights: which class it is, and what its layers are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.core.errors import SourceError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder. Raises SourceError when it is missing or damaged."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SourceError(f"'{folder}' has no config.json; name a Hugging Face model folder.") from None
    except (OSError, ValueError, RecursionError):
        raise SourceError(f"'{path}' is damaged; copy the model again.") from None
    if not isinstance(config, dict):
        raise SourceError(f"'{path}' is damaged; copy the model again.")
    return config


def model_class(config: dict[str, Any]) -> type[PreTrainedModel]:
    """The Transformers class that ``architectures`` names. Raises UnsupportedError when Transformers has none of them.

    Only classes of the installed library are considered; code that comes with a checkpoint is never imported.
    """
    import transformers

    names = config.get("architectures") or []
    for name in names:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    described = ", ".join(map(str, names)) or "no architecture"
    raise UnsupportedError(
        f"The config names {described}, which Transformers {transformers.__version__} does not have; upgrade it or "
        "check 'architectures' in config.json."
    )


def skeleton(folder: Path, raw: dict[str, Any] | None = None) -> PreTrainedModel:
    """The model of a folder on the meta device: names and shapes, no memory. ``raw`` stands in for its config.json.

    Raises as ``model_class``, and SourceError when the class cannot be built from the configuration.
    """
    raw = read_config(folder) if raw is None else raw
    cls = model_class(raw)
    try:
        config: Any = cls.config_class.from_dict(raw)  # type: ignore[union-attr]
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return cls(config)
    except Exception as failure:  # Transformers' own checks raise anything
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0].rstrip(".")
        raise SourceError(
            f"The config.json of '{folder.name}' does not describe a {cls.__name__} ({reason}); copy the model again."
        ) from failure
