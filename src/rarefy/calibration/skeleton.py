"""A model's module tree without its weights: which class it is, and what its layers are called."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rarefy.core.errors import SourceError, UnsupportedError, first_line

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
    with torch.device("meta"):
        return _build(folder, raw)


def runnable_skeleton(folder: Path) -> PreTrainedModel:
    """``skeleton`` in evaluation mode, whose buffers are real: what a class computes by itself (rotary frequencies,
    causal masks) is in no file. Experts are multiplied one by one, so that each one's inputs can be seen."""
    with _parameters_on_meta():
        model = _build(folder, None)
    use_expert_loop_(model)
    return model.eval()


def skeleton_of(model: nn.Module) -> PreTrainedModel:
    """``runnable_skeleton`` of a model in memory; its buffers are copies. Raises UnsupportedError for other modules."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"{type(model).__name__} is not a Transformers model, which recipes that need data run block by block; "
            "use a data-free recipe."
        )
    with _parameters_on_meta():
        twin = type(model)(copy.deepcopy(model.config))
    use_expert_loop_(twin)
    return twin.eval()


def use_expert_loop_(model: nn.Module) -> None:
    """Have experts run one by one: each is then indexed by itself, which compressing and observing them needs."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built here keep their buffers but lose their parameters to the meta device as soon as they have them.

    A fresh parameter's memory is not touched before it is initialised, and by then it is gone.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _build(folder: Path, raw: dict[str, Any] | None) -> PreTrainedModel:
    raw = read_config(folder) if raw is None else raw
    cls = model_class(raw)
    try:
        config: Any = cls.config_class.from_dict(raw)  # type: ignore[union-attr]
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return cls(config)
    except Exception as failure:  # Transformers' own checks raise anything
        reason = first_line(failure)
        raise SourceError(
            f"The config.json of '{folder.name}' does not describe a {cls.__name__} ({reason}); copy the model again."
        ) from failure
