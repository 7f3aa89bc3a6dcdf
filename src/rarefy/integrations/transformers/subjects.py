"""Models as people name them or hold them, turned into what an evaluation takes, with one tokenizer for all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.calibration.data_free import weight_files
from rarefy.core.devices import Device, check_dtype, device_of, fast_dtype
from rarefy.core.errors import OptionError
from rarefy.core.files import read_header
from rarefy.evaluation.candidates import Candidate, dense_sizes
from rarefy.evaluation.journal import fingerprint
from rarefy.evaluation.results import Sizes
from rarefy.formats.bytes import ByteCount
from rarefy.integrations.transformers import models as folders
from rarefy.integrations.transformers.plan_setup import share_read
from rarefy.layers.manifest import Manifest, read_manifest
from rarefy.sources.model_source import ModelSource
from rarefy.sources.models import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rarefy.evaluation.forward import CacheFactory


@dataclass(frozen=True)
class Subjects:
    """What is measured: ``candidates``, the ``reference`` or None, their ``tokenizer``, and where they run.

    ``free_bytes``: free memory of a GPU; None where the machine's own counts.
    """

    candidates: list[Candidate]
    reference: Candidate | None
    tokenizer: Any
    device: torch.device
    free_bytes: int | None


def open_subjects(
    models: Sequence[str | Path | PreTrainedModel],
    reference: str | Path | PreTrainedModel | None,
    *,
    dtype: str | torch.dtype = "auto",
    device: Device = "auto",
    tokenizer: Any = None,
    cache: CacheFactory | None = None,
) -> Subjects:
    """Find every model; none is loaded yet. ``cache``: the KV cache of the candidates (the reference keeps the dense
    one). Raises SourceError, OptionError, CheckpointError."""
    everyone = [*models] if reference is None else [reference, *models]
    if not everyone:
        raise OptionError("Name at least one model to evaluate.")
    sources = [open_model(model) if isinstance(model, str | Path) else None for model in everyone]
    tokenizer = tokenizer or shared_tokenizer(everyone, sources)
    check_dtype(dtype)
    place = device_of(device)
    dtype = _compute_dtype(dtype, sources[0], place)
    names = _names(everyone, sources)
    candidates = [
        _candidate(name, model, source, dtype, place, cache if reference is None or index else None)
        for index, (name, model, source) in enumerate(zip(names, everyone, sources, strict=True))
    ]
    first = None if reference is None else candidates.pop(0)
    free = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else None
    return Subjects(candidates, first, tokenizer, place, free)


def _names(models: Sequence[Any], sources: Sequence[ModelSource | None]) -> list[str]:
    """Short names for tables; models whose short names are equal go by what the caller wrote."""
    short = [name_of(model) if source is None else source.name for model, source in zip(models, sources, strict=True)]
    return [
        str(model) if isinstance(model, str | Path) and short.count(name) > 1 else name
        for model, name in zip(models, short, strict=True)
    ]


def name_of(model: PreTrainedModel) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _candidate(
    name: str,
    model: Any,
    source: ModelSource | None,
    dtype: str | torch.dtype,
    device: torch.device,
    cache: CacheFactory | None,
) -> Candidate:
    if source is None:
        manifest = getattr(getattr(model.config, "quantization_config", None), "manifest", None)
        return Candidate(name, model=model, sizes=_sizes(manifest) if manifest else dense_sizes(model), cache=cache)
    folder = source.folder

    def open_it() -> Any:
        model: Any = folders.load_folder(folder, dtype=dtype)
        return model.to(device)

    if folders.is_compressed(folder):
        manifest = read_manifest(folders.read_config(folder)["quantization_config"])
        # One without rules has dense weights, and is there for its attention or its cache.
        own = folder.glob(f"{manifest.weights.partition('.')[0]}*.safetensors")
        sizes = _sizes(manifest) if manifest.rules else _dense_file_sizes(own)[0]
        resident = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    else:
        sizes, weights = _dense_file_sizes(weight_files(folder))
        wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        resident = weights * wanted.itemsize if isinstance(wanted, torch.dtype) else sizes.stored_bytes or 0
    identity = f"{fingerprint(folder)}, {dtype}, {device.type}" if cache is None else None
    return Candidate(
        name, load=open_it, resident_bytes=resident, sizes=sizes, cache=cache, density=share_read, identity=identity
    )


def _compute_dtype(dtype: str | torch.dtype, first: ModelSource | None, device: torch.device) -> str | torch.dtype:
    """One dtype for all models: as the first is stored, but float32 where a CPU would emulate 16-bit arithmetic."""
    if dtype != "auto" or first is None:
        return dtype
    stored = str(folders.read_config(first.folder).get("dtype") or "float32")
    emulated = device.type == "cpu" and stored in ("float16", "bfloat16") and fast_dtype(device) == torch.float32
    return "float32" if emulated else stored


def _sizes(manifest: Manifest) -> Sizes:
    report = manifest.report
    if report is None:
        return Sizes()
    return Sizes(
        bits_per_weight=report.bits_per_weight, stored_bytes=report.stored_bytes, dense_bytes=report.dense_bytes
    )


def _dense_file_sizes(files: Iterable[Path]) -> tuple[Sizes, int]:
    tensors = [info for path in files for info in read_header(path).tensors.values()]
    size, count = sum(info.nbytes for info in tensors), sum(math.prod(info.shape) for info in tensors)
    bits = ByteCount(values=size).bits_per_weight(count)
    return Sizes(bits_per_weight=bits, stored_bytes=size, dense_bytes=size), count


def shared_tokenizer(models: Sequence[Any], sources: Sequence[ModelSource | None]) -> Any:
    for model, source in zip(models, sources, strict=True):
        folder = source.folder if source is not None else Path(str(getattr(model.config, "_name_or_path", "")))
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            return folders.load_tokenizer(folder)
    raise OptionError("None of the models has a tokenizer beside it; pass tokenizer=.")
