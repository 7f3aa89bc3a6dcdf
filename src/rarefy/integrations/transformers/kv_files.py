"""KV caches on disk, so that a prefix that many prompts share is read by the model once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rarefy.core.errors import CheckpointError, UnsupportedError
from rarefy.core.files import write_tensors
from rarefy.integrations.transformers.kv_cache import CodedCache, CodedLayer
from rarefy.integrations.transformers.kv_setup import KvSetup, digest, file_about, read_about

FORMAT = "rarefy-kv-cache-1"


def save_cache(cache: CodedCache, path: str | Path, model: Any) -> None:
    """Write all layers of ``cache`` to a safetensors file, bound to ``model`` and to the setup that made the cache.

    Raises UnsupportedError for layers that are neither in code nor plain nor sliding.
    """
    tensors: dict[str, Tensor] = {}
    layers: list[Any] = list(cache.layers)
    for index, layer in enumerate(layers):
        if not layer.is_initialized:
            continue
        if isinstance(layer, CodedLayer):
            own = layer.store.tensors()
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            seen = torch.tensor(layer.get_seq_length())
            own = {"plain.keys": layer.keys, "plain.values": layer.values, "plain.seen": seen}
        else:
            raise UnsupportedError(f"Layer {index} of this cache is a {type(layer).__name__}, which cannot be saved.")
        tensors.update({f"layers.{index}.{name}": tensor.contiguous() for name, tensor in own.items()})
    about = file_about(FORMAT, model=digest(model), setup=cache.setup_of(), layers=len(cache))
    write_tensors(Path(path), tensors, about)


def load_cache(path: str | Path, model: Any, setup: KvSetup) -> CodedCache:
    """The cache in a file that `save_cache` wrote, on the model's device. Raises CheckpointError when the file is
    damaged or was written with another model or setup."""
    from safetensors.torch import load_file

    path = Path(path)
    about = read_about(path, FORMAT)
    if about is None:
        raise CheckpointError(f"'{path.name}' holds no KV cache of this version; run the model on the prefix anew.")
    if about.get("model") != digest(model):
        raise CheckpointError(
            f"'{path.name}' is the cache of another model than this {type(model).__name__}; "
            "load the model it was saved with, or run the prefix anew."
        )
    cache = setup(model)
    if about.get("setup") != cache.setup_of() or about.get("layers") != len(cache):
        raise CheckpointError(f"'{path.name}' was written with another KV cache recipe or other options; use those.")
    found: list[dict[str, Tensor]] = [{} for _ in cache.layers]
    for full, tensor in load_file(path, device=str(model.device)).items():
        _, number, name = full.split(".", 2)
        found[int(number)][name] = tensor
    for index, (layer, own) in enumerate(zip(cache.layers, found, strict=True)):
        if not own:
            continue
        try:
            _restore(layer, own, model)
        except (KeyError, RuntimeError, IndexError) as failure:
            raise CheckpointError(f"Layer {index} of '{path.name}' is damaged ({failure}); write it anew.") from None
    return cache


def _restore(layer: Any, own: dict[str, Tensor], model: Any) -> None:
    if isinstance(layer, CodedLayer):
        keys, values = own["keys.tail"], own["values.tail"]
        layer.lazy_initialization(keys, values)
        layer.store.restore_(own)
        return
    layer.lazy_initialization(own["plain.keys"], own["plain.values"])
    layer.keys, layer.values = own["plain.keys"], own["plain.values"]
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = int(own["plain.seen"])
