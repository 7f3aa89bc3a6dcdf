"""A model to evaluate: loaded, or still to be loaded, with its name and sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.evaluation.forward import CacheFactory
from rarefy.evaluation.results import Sizes
from rarefy.formats.bytes import ByteCount

# The share of free memory that models may take; the rest is for logits and activations.
MODEL_SHARE = 0.8


@dataclass(frozen=True)
class Candidate:
    """Give ``model``, or ``load``, which is called when the model is needed and whose result is dropped afterwards.

    ``resident_bytes`` is what the model of ``load`` will occupy; 0 means unknown, and it then never shares a pass.
    ``cache`` makes the KV cache it is measured with, where one is read; None means the dense one of Transformers.
    ``density`` tells of a model that attends sparsely which share of blocks it read, and warns where none was chosen.
    ``identity`` says which model it is for results that are kept; None (as for models in memory) keeps none.
    """

    name: str
    model: Any = None
    load: Callable[[], Any] | None = None
    resident_bytes: int = 0
    sizes: Sizes | None = None
    cache: CacheFactory | None = None
    density: Callable[[Any], float | None] | None = None
    identity: str | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.load is None):
            raise OptionError(f"Candidate '{self.name}' needs a model or a way to load one; give one of the two.")

    def open(self) -> Any:
        """The model, loaded if need be. Raises UnsupportedError unless it predicts next tokens."""
        model = self.model if self.load is None else self.load()
        check_causal(model, self.name)
        return model

    def share_read(self, model: Any) -> float | None:
        """The ``density`` of the opened ``model`` once it has been measured; None where attention is dense."""
        return None if self.density is None else self.density(model)


def plan_passes(
    candidates: Sequence[Candidate], reference: Candidate | None, free_bytes: int | None
) -> list[list[int]]:
    """Split ``candidates``, by index, into passes whose models fit into ``free_bytes`` beside the reference.

    Loaded models cost nothing more, so they all go into the first pass. With ``free_bytes=None`` (unknown) models that
    have to be loaded come one by one.
    """
    budget = (free_bytes or 0) * MODEL_SHARE
    if reference is not None:
        budget -= reference.resident_bytes
    passes = [[index for index, candidate in enumerate(candidates) if candidate.load is None]]
    used: float = 0
    for index, candidate in enumerate(candidates):
        if candidate.load is None:
            continue
        need = candidate.resident_bytes or float("inf")
        if passes[-1] and used + need > budget:
            passes.append([])
            used = 0
        passes[-1].append(index)
        used += need
    return [group for group in passes if group]


def check_causal(model: Any, name: str) -> None:
    """Raise UnsupportedError, naming the class, unless ``model`` predicts each token from those before it."""
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    causal = (
        config is not None
        and callable(can_generate)
        and bool(can_generate())
        and not getattr(config, "is_encoder_decoder", False)
        and getattr(config, "is_decoder", True)  # BERT-like heads generate only when configured as decoders
    )
    if not causal:
        raise UnsupportedError(
            f"'{name}' is a {type(model).__name__}, which does not predict next tokens; perplexity and KL need a "
            "causal language model."
        )


def check_length(model: Any, name: str, tokens: int) -> None:
    """Raise OptionError when ``tokens`` are more than ``model`` has positions: on a GPU that would end the process."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if limit is not None and tokens > limit and rope == "default":  # a scaled RoPE is there to go beyond
        raise OptionError(f"A context of {tokens} is more than the {limit} positions of '{name}'; use a shorter one.")


def dense_sizes(model: torch.nn.Module) -> Sizes:
    """Sizes of a dense model as it is loaded: every parameter once (tied ones too), at its own dtype."""
    count = sum(parameter.numel() for parameter in model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Sizes(bits_per_weight=ByteCount(values=size).bits_per_weight(count), stored_bytes=size, dense_bytes=size)
