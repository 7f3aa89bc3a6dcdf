"""A GGUF file as an ordinary Transformers folder: dense safetensors, configuration, tokenizer, chat template."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.core.errors import SourceError
from rarefy.core.files import write_text
from rarefy.core.progress import progress
from rarefy.sources.cache import cached_folder
from rarefy.sources.gguf_header import GgufFile, read_gguf
from rarefy.sources.gguf_model import Blueprint, Parameter, blueprint, token_ids
from rarefy.sources.gguf_tokenizer import write_tokenizer
from rarefy.sources.model_source import ModelSource
from rarefy.sources.shards import write_shards

if TYPE_CHECKING:
    import torch

    Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], dict[str, torch.Tensor]]

HALVES = {"F16": "float16", "BF16": "bfloat16"}
# Configuration and tokenizer beside the weights.
EXTRA_BYTES = 100 * 10**6


def open_gguf(path: Path) -> ModelSource:
    """Convert ``path`` once and return the cached folder.

    Weights of quantized or float32 files become float32; when every matrix is F16 or every one BF16, all tensors
    keep that type. The cache knows the file by its place, size and time of change.
    """
    try:
        status = path.stat()
        file = read_gguf(path)
    except OSError as failure:
        raise SourceError(f"'{path}' cannot be read ({failure.strerror}); check its permissions.") from None
    identity: dict[str, str | int | float] = {
        "kind": "gguf", "path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns,
    }
    needed = dense_bytes(file) + EXTRA_BYTES
    folder = cached_folder(path.stem, identity, needed, lambda stage: write_folder(stage, file))
    return ModelSource(path.stem, folder, f"dense reference = {describe(file)}, not the original release")


def describe(file: GgufFile) -> str:
    """What the dense weights were made from, for notes: ``dequantized Q4_1 checkpoint`` or ``F16 checkpoint``."""
    sizes: collections.Counter[str] = collections.Counter()
    for name, info in file.tensors.items():
        if name.startswith("blk.") and len(info.shape) > 1:
            sizes[info.type] += info.nbytes
    types = "/".join(kind for kind, _ in sizes.most_common())
    return f"{types} checkpoint" if set(sizes) <= {"F32", *HALVES} else f"dequantized {types} checkpoint"


def dense_dtype(file: GgufFile) -> str:
    """``float16`` or ``bfloat16`` when all matrices of the file have that type, else ``float32``."""
    types = {info.type for info in file.tensors.values() if len(info.shape) > 1}
    return HALVES.get(types.pop(), "float32") if len(types) == 1 else "float32"


def dense_bytes(file: GgufFile) -> int:
    """Bytes of the tensors once dense."""
    width = 4 if dense_dtype(file) == "float32" else 2
    return sum(math.prod(info.shape) * width for info in file.tensors.values())


def write_folder(stage: Path, file: GgufFile, change: Change | None = None, base_model: str | None = None) -> None:
    """Fill ``stage`` from ``file``. ``change(state, config)`` may replace the weights before they are written; it
    needs all of them in memory at once, which is otherwise true of one shard only."""
    import torch
    from transformers import AutoConfig, GenerationConfig

    plan = blueprint(file)
    write_tokenizer(stage, file.fields, plan.config["max_position_embeddings"], file.path.name)
    dtype = dense_dtype(file)
    model_type = plan.config["model_type"]
    rest = {key: value for key, value in plan.config.items() if key != "model_type"}
    AutoConfig.for_model(model_type, dtype=dtype, **rest).save_pretrained(stage)
    GenerationConfig(**token_ids(file.fields)).save_pretrained(stage)
    _write_card(stage, file, base_model)
    _write_weights(stage, file, plan, getattr(torch, dtype), change)


def _write_weights(stage: Path, file: GgufFile, plan: Blueprint, dtype: torch.dtype, change: Change | None) -> None:
    sizes = {name: math.prod(parameter.shape) * dtype.itemsize for name, parameter in plan.parameters.items()}
    with progress(f"Reading {file.path.name}", len(sizes)) as advance:

        def load(name: str) -> torch.Tensor:
            tensor = read_parameter(file, plan.parameters[name]).to(dtype)
            advance()
            return tensor

        if change is None:
            write_shards(stage, sizes, load)
        else:
            state = change({name: load(name) for name in sizes}, plan.config)
            write_shards(stage, sizes, state.__getitem__)


def read_parameter(file: GgufFile, parameter: Parameter) -> torch.Tensor:
    """One parameter as float32 in Transformers' layout (shape ``parameter.shape``)."""
    tensor = file.read(parameter.stored)
    heads = parameter.permuted_heads
    if not heads:
        return tensor
    # Stored: the two halves of each head interleaved, row by row. Wanted: first half, then second half.
    pairs = tensor.reshape(heads, parameter.shape[0] // heads // 2, 2, *parameter.shape[1:])
    return pairs.transpose(1, 2).reshape(parameter.shape).contiguous()


def _write_card(stage: Path, file: GgufFile, base_model: str | None) -> None:
    meta = {"license": file.fields.get("general.license"), "base_model": base_model}
    # JSON strings are YAML strings: whatever the file says cannot break the header.
    header = "".join(f"{key}: {json.dumps(value)}\n" for key, value in meta.items() if isinstance(value, str))
    title = file.fields.get("general.name") or file.path.stem
    body = f"# {title}\n\nDense weights restored from `{file.path.name}` ({describe(file)}).\n"
    write_text(stage / "README.md", f"---\n{header}---\n\n{body}" if header else body)
