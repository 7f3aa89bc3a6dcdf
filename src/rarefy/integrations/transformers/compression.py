"""Compressing a loaded model, or a folder into another: what `rarefy.compress` does once it knows model and data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.calibration.calibrated import Calibration, needed
from rarefy.calibration.data_free import assist_folder, can_stream, compress_folder, compress_model_
from rarefy.calibration.parallel import Ranks, ranks_of
from rarefy.calibration.report import CompressionReport, Ledger
from rarefy.calibration.samples import open_samples
from rarefy.contracts import Recipe
from rarefy.core.devices import Device, device_of
from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.core.files import check_out, staged_folder
from rarefy.core.logs import logger
from rarefy.core.memory import peak_bytes, reset_peak
from rarefy.evaluation.candidates import dense_sizes
from rarefy.integrations.transformers import models as folders
from rarefy.integrations.transformers.quantizer import attach_
from rarefy.integrations.transformers.subjects import name_of, shared_tokenizer
from rarefy.layers.checkpoint import parse_size
from rarefy.layers.manifest import Manifest
from rarefy.recipes import load_recipe
from rarefy.sources.model_source import ModelSource
from rarefy.sources.models import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logger(__name__)


def compress(
    model: str | Path | PreTrainedModel, recipe: str | Path | Recipe, options: Mapping[str, Any] | None, *,
    out: Path | None, data: Any, samples: int, seq_len: int, tokenizer: Any, work: Path | None, device: Device,
    seed: int, max_shard_size: str | int, overwrite: bool, revision: str | None, save: Callable[..., None],
) -> CompressionReport:  # fmt: skip
    """As `rarefy.compress`; ``save`` writes a model that was compressed in memory."""
    start = time.monotonic()
    reset_peak()
    chosen, place = load_recipe(recipe, options), device_of(device)
    # A model in memory is each process's own, and without data there is nothing to share.
    ranks, place = ranks_of(place) if needed(chosen) or isinstance(model, str | Path) else (Ranks(), place)
    used = {place} if isinstance(model, str | Path) else {place, *(own.device for own in model.parameters())}
    gpus = [own for own in used if own.type == "cuda"]
    # Of the GPUs that take no part even a random state would cost a second and half a gigabyte.
    with ranks.together(), torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        shard_bytes, notes = parse_size(max_shard_size), ignored_data(chosen, data)

        def calibration(known: Any, config: Any) -> Calibration | None:
            if not needed(chosen):
                return None
            data_ = open_samples("demo" if data is None else data, tokenizer or known, config, samples, seq_len, seed)
            return Calibration(data_, ranks, seed, work)

        if not isinstance(model, str | Path):
            if out is not None:
                check_out(out, overwrite)
            if not hasattr(model, "config"):
                raise OptionError(f"A {type(model).__name__} is no model of Transformers; give one, or a folder.")
            given = calibration(lambda: shared_tokenizer([model], [None]), model.config)
            solve_on = None if device == "auto" else place
            ledger, skipped, manifest = compress_in_place(model, chosen, solve_on, work, notes, given)
            name = name_of(model)
            if out is not None and ranks.leads:
                save(model, out, max_shard_size=shard_bytes, overwrite=overwrite)
        else:
            if out is None:
                raise OptionError("Say where to write the compressed model: out=FOLDER (--out on the command line).")
            if ranks.leads:  # the others may come when it is being written
                check_out(out, overwrite)
            source = open_model(model, revision)
            name = source.name
            if out.resolve() in (source.folder.resolve(), *source.folder.resolve().parents):
                raise OptionError(f"--out '{out}' holds the model itself; name another folder.")
            given = calibration(lambda: folders.load_tokenizer(source.folder), folders.read_config(source.folder))
            if not ranks.leads:
                return assist(source, chosen, place, given, ranks)
            ledger, skipped, manifest = compress_source(
                source, chosen, out, shard_bytes, place, work, overwrite, notes, given
            )
        report = manifest.report
        assert report is not None
        result = CompressionReport(
            model=name, recipe=chosen.name, out=None if out is None else str(out),
            bits_per_weight=report.bits_per_weight, weights=report.weights, stored_bytes=report.stored_bytes,
            dense_bytes=report.dense_bytes, seconds=time.monotonic() - start, peak_bytes=peak_bytes(),
            layers=tuple(ledger.layers), skipped=skipped, fallbacks=ledger.fallbacks, notes=tuple(ledger.notes),
        )  # fmt: skip
        return CompressionReport.model_validate_json(ranks.tell(result.model_dump_json()))


def compress_in_place(
    model: PreTrainedModel,
    recipe: Recipe,
    device: torch.device | None,
    work: Path | None,
    notes: list[str],
    calibration: Calibration | None,
) -> tuple[Ledger, dict[str, str], Manifest]:
    """Compress the loaded ``model``; the ledger, the layers left out with the reason, and the manifest."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedError("This model is quantized already; load the dense model and compress that.")
    dense_bytes = dense_sizes(model).stored_bytes or 0
    ledger, skipped = compress_model_(
        model, recipe, device=device, work_dir=work, calibration=calibration
    )
    ledger.notes[:0] = notes
    stored = sum(tensor.numel() * tensor.element_size() for _, tensor in folders.stored_tensors(model))
    manifest = ledger.manifest(stored, dense_bytes)
    attach_(model, manifest)
    return ledger, skipped, manifest


def compress_source(
    source: ModelSource,
    recipe: Recipe,
    out: Path,
    shard_bytes: int,
    device: torch.device,
    work: Path | None,
    overwrite: bool,
    notes: list[str],
    calibration: Calibration | None,
) -> tuple[Ledger, dict[str, str], Manifest]:
    """Compress the model of ``source`` into the folder ``out``, block by block where its files allow; as
    `compress_in_place`."""
    config = folders.read_config(source.folder)
    if config.get("quantization_config"):
        quantization = config["quantization_config"]
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedError(
            f"'{source.name}' is compressed already (quant_method '{method}'); compress the dense model."
        )
    notes = [source.note, *notes]
    with staged_folder(out, overwrite) as stage:
        if can_stream(source.folder):
            ledger, manifest, skipped = compress_folder(
                source.folder,
                source.name,
                recipe,
                stage,
                max_shard_bytes=shard_bytes,
                device=device,
                work_dir=work,
                notes=notes,
                calibration=calibration,
            )
            return ledger, skipped, manifest
        log.warning(
            "The checkpoint's tensor names are not the model's own, so the whole model is loaded to compress it."
        )
        model = folders.load_folder(source.folder, dtype="auto")
        ledger, skipped, manifest = compress_in_place(model, recipe, device, work, notes, calibration)
        folders.write_model(model, stage, source.folder, source.name, shard_bytes)
    return ledger, skipped, manifest


def assist(
    source: ModelSource, recipe: Recipe, device: torch.device, calibration: Calibration | None, ranks: Ranks
) -> CompressionReport:
    """What a rank does that writes nothing; it returns the first one's report."""
    if calibration is not None and can_stream(source.folder):
        assist_folder(source.folder, recipe, calibration, device)
    elif calibration is not None:
        model = folders.load_folder(source.folder, dtype="auto")
        compress_model_(model, recipe, device=device, calibration=calibration)
    return CompressionReport.model_validate_json(ranks.tell(""))


def ignored_data(recipe: Recipe, data: Any) -> list[str]:
    """A note, and a warning, when a recipe has no use for the calibration data that it was given."""
    if data is None or needed(recipe):
        return []
    log.warning("Recipe '%s' is data-free; the calibration data is not used.", recipe.name)
    return [f"recipe '{recipe.name}' is data-free: calibration data '{data}' was not used"]
