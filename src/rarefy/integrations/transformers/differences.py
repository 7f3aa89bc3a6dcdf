"""Two stored models layer by layer: how each layer is stored in both, and how far its weights are apart."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import OptionError
from rarefy.evaluation.results import LayerDifference
from rarefy.integrations.transformers.description import describe
from rarefy.integrations.transformers.models import load_folder
from rarefy.layers.swap import compressed, dense_weight, sites


def compare_layers(first: Path, second: Path) -> tuple[LayerDifference, ...]:
    """Every layer that both models have, in order. Both are loaded, on the CPU.

    Raises OptionError when they have no layer in common, and what loading raises.
    """
    about = [{layer["name"]: layer for layer in describe(folder)["layers"]} for folder in (first, second)]
    common = [name for name in about[0] if name in about[1]]
    if not common:
        raise OptionError(f"'{first.name}' and '{second.name}' have no layer of the same name; compare like with like.")
    ours, theirs = _weights(load_folder(first, dtype="auto")), _weights(load_folder(second, dtype="auto"))
    found = tuple(
        LayerDifference(
            name=name, first=about[0][name]["stored_as"], second=about[1][name]["stored_as"],
            first_bits=about[0][name]["bits_per_weight"], second_bits=about[1][name]["bits_per_weight"],
            difference=_apart(ours[name](), theirs[name]()),
        )
        for name in common
    )  # fmt: skip
    del ours, theirs
    gc.collect()  # models hold reference cycles
    return found


def _weights(model: Any) -> dict[str, Callable[[], Tensor]]:
    """What gives the weight of each layer, decoded only when called."""
    dense = {site.name: partial(dense_weight, model, site) for site in sites(model)}
    return {**dense, **{name: module.decode for name, module in compressed(model)}}


@torch.inference_mode()
def _apart(first: Tensor, second: Tensor) -> float | None:
    if first.shape != second.shape:
        return None
    first, second = first.float(), second.float()
    return float((second - first).norm() / first.norm().clamp_min(torch.finfo(torch.float32).tiny))
