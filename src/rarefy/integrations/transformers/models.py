"""Loading and saving whole model folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rarefy.calibration.output import copy_companions, write_card, write_config
from rarefy.calibration.selection import tied_parameters
from rarefy.calibration.skeleton import model_class, read_config
from rarefy.core.errors import OptionError, SourceError, first_line
from rarefy.core.files import staged_folder
from rarefy.layers.checkpoint import ShardWriter
from rarefy.layers.manifest import WEIGHTS_NAME, Manifest
from rarefy.layers.swap import compressed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_folder(folder: Path, **options: Any) -> PreTrainedModel:
    """The model in ``folder``, dense or compressed, as the class its config names, in evaluation mode.

    Raises SourceError when the folder cannot be loaded, or a tensor is absent or of another shape than the config says:
    nothing is ever drawn at random.
    """
    from safetensors import SafetensorError

    cls: Any = model_class(read_config(folder))
    # Other shapes are let through here and refused below, where the sentence can name the tensor.
    options = {**options, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = cls.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as failure:
        reason = first_line(failure)
        raise SourceError(f"'{folder}' cannot be loaded as a {cls.__name__} ({reason}); copy it again.") from failure
    if info["missing_keys"]:
        first, *others = sorted(info["missing_keys"])
        more = f" and {len(others)} more" if others else ""
        raise SourceError(f"'{folder}' lacks the tensor '{first}'{more} of a {cls.__name__}; copy the whole model.")
    if info["mismatched_keys"]:
        first = min(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
        raise SourceError(
            f"Tensor '{first}' of '{folder}' has another shape than its config says; copy the whole model."
        )
    return model.eval()


def is_compressed(folder: Path) -> bool:
    """Whether the folder holds a rarefy checkpoint."""
    data = read_config(folder).get("quantization_config")
    return isinstance(data, dict) and data.get("quant_method") == "rarefy"


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises SourceError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as failure:
        reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        raise SourceError(f"'{folder}' has no usable tokenizer ({reason}); add its tokenizer files.") from None


def save_model(
    model: PreTrainedModel,
    out: Path,
    *,
    source: Path | None,
    base: str,
    tokenizer: Any,
    max_shard_bytes: int,
    overwrite: bool,
) -> None:
    """Write a compressed model as a folder of its own: hashed weight files, config, tokenizer, model card.

    ``source``: the folder it came from, whose tokenizer, configs and licence travel along.
    """
    with staged_folder(out, overwrite) as stage:
        write_model(model, stage, source, base, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)


def write_model(model: PreTrainedModel, stage: Path, source: Path | None, base: str, max_shard_bytes: int) -> None:
    """``save_model`` into an existing empty folder."""
    from rarefy.integrations.transformers import kv_setup, plan_setup

    manifest = manifest_of(model)
    here, there = {name for name, _ in compressed(model)}, set(manifest.terms())
    if here != there:
        raise OptionError(
            f"Layer '{min(here ^ there)}' was added, renamed or replaced since the model was compressed; "
            "remove adapters with model.unload() or add them with rarefy.merge_adapter(model) before saving."
        )
    writer = ShardWriter(stage, WEIGHTS_NAME, max_shard_bytes)
    for name, tensor in stored_tensors(model):
        writer.add(name, tensor)
    runtime = {"kv": kv_setup.store_setup(model, stage), "attention": plan_setup.store_setup(model, stage)}
    manifest = writer.finish(manifest.model_copy(update=runtime))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(stage)
    if source is not None:
        copy_companions(source, stage)
    if model.can_generate() and model.generation_config is not None:
        with suppress(ValueError):  # one that came with the model stays as it is, though Transformers may refuse it
            model.generation_config.save_pretrained(stage)
    config = json.loads((stage / "config.json").read_text("utf-8"))
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    write_config(stage, config, manifest)
    write_card(stage, base, type(model).__name__, manifest, source)


def manifest_of(model: Any) -> Manifest:
    """The manifest of a model that is compressed, or attends or caches by a recipe. Raises OptionError for others."""
    from rarefy.integrations.transformers import kv_setup, plan_setup

    manifest = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "manifest", None)
    runtime = any(getattr(model, module.SETUP, None) is not None for module in (kv_setup, plan_setup))
    if runtime and getattr(getattr(model, "config", None), "quantization_config", None) is None:
        return Manifest(recipe="dense", rules=())
    if not isinstance(manifest, Manifest):
        raise OptionError(f"This {type(model).__name__} is not compressed by rarefy; call rarefy.compress first.")
    return manifest


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that belongs on disk by its name in memory, tied ones once."""
    tied = tied_parameters(model)
    state = model.state_dict()
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name, tensor in state.items():
        owner = tied.get(name)
        shares = owner in state and state[owner].data_ptr() == tensor.data_ptr() and tensor.numel() > 0
        if name not in ignored and not shares:
            yield name, tensor
