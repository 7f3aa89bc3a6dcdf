"""Compressing a loaded model, or a folder into another: what `rarefy.compress` does once it knows model and data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.calibration.calibrated import Calibration, needed
from rarefy.calibration.data_free import assist_folder, can_stream, compress_folder, compress_model_
from rarefy.calibration.parallel import Ranks
from rarefy.calibration.report import CompressionReport, Ledger
from rarefy.contracts import Recipe
from rarefy.core.errors import UnsupportedError
from rarefy.core.files import staged_folder
from rarefy.core.logs import logger
from rarefy.evaluation.candidates import dense_sizes
from rarefy.integrations.transformers import models as folders
from rarefy.integrations.transformers.quantizer import attach_
from rarefy.layers.manifest import Manifest
from rarefy.sources.model_source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logger(__name__)


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
