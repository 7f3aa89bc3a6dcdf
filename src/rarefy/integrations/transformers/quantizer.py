"""What ``from_pretrained`` calls: check the files, put compressed modules on the meta device, check what was loaded.

Compressed modules hold plain buffers named as in the files, so Transformers' own loader fills them; nothing here
depends on how a particular 5.x converts weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from rarefy.calibration.selection import may_be_absent
from rarefy.calibration.skeleton import use_expert_loop_
from rarefy.core.errors import CheckpointError, FormatError, OptionError, UnsupportedError
from rarefy.core.logs import logger
from rarefy.integrations.transformers.config import RarefyConfig
from rarefy.layers import swap
from rarefy.layers.checkpoint import (
    check_digests,
    check_index,
    check_places,
    expected_sizes,
    metadata,
    read_headers,
)
from rarefy.layers.execution import set_executor_
from rarefy.layers.manifest import Manifest, layer_layout

log = logger(__name__)
PLAIN_NAME = "model.safetensors"  # what save_pretrained writes


class RarefyQuantizer(HfQuantizer):
    """Loads checkpoints that rarefy made; it does not compress (``rarefy.compress`` does)."""

    requires_calibration = True

    @property
    def manifest(self) -> Manifest:
        assert isinstance(self.quantization_config, RarefyConfig)
        return self.quantization_config.manifest

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise OptionError("A rarefy model is compressed first, with rarefy.compress or 'rarefy compress'.")

    def update_attn_implementation(self, config: Any) -> Any:
        """Newer Transformers call this before they look for weight files."""
        return self._name_weights(config)

    def update_tp_plan(self, config: Any) -> Any:
        """Older Transformers call this before they look for weight files; releases around 5.19 call both."""
        return self._name_weights(config)

    def update_weight_conversions(self, weight_conversions: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """No renaming of a family's older names: those in the files were checked to be the model's own."""
        return []

    def _name_weights(self, config: Any) -> Any:
        if self.manifest.weights.removesuffix(".index.json") != PLAIN_NAME:
            config.transformers_weights = self.manifest.weights
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if not files:
            raise CheckpointError("A rarefy checkpoint is loaded from files; pass the folder's name.")
        if any(file.suffix != ".safetensors" for file in files):
            raise CheckpointError(f"'{files[0].name}' is not a safetensors file; rarefy loads nothing else.")
        check_places(files, str(getattr(model.config, "_name_or_path", "") or ""))
        check_index(files[0].parent, self.manifest.weights)
        prepare_(model, self.manifest, files)
        self._files = files
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        reread_(model, self._files)
        for name, module in swap.compressed(model):
            for term in module.terms:
                try:
                    term.check()  # type: ignore[operator]
                except FormatError as failure:
                    raise CheckpointError(f"Layer '{name}': {failure}; the checkpoint is damaged.") from None
        _connect(model)
        keep_names_(model)
        set_executor_(model, self.manifest.execution.executor)
        if self.manifest.kv is not None:
            from rarefy.integrations.transformers.kv_setup import restore_setup_

            restore_setup_(model, self.manifest.kv, self._files[0].parent)
        if self.manifest.attention is not None:
            from rarefy.integrations.transformers import plan_setup

            plan_setup.restore_setup_(model, self.manifest.attention, self._files[0].parent)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """``save_pretrained`` writes the usual file names; the config says so, and hashes of the tensors go along."""
        if getattr(model, "_hf_peft_config_loaded", False):  # then only an adapter is saved
            return None, {}
        manifest = self.manifest.model_copy(update={"weights": PLAIN_NAME})
        if manifest.kv is not None and manifest.kv.params is not None:
            log.warning("save_pretrained leaves out the parameters of the KV cache; rarefy.save writes them too.")
            manifest = manifest.model_copy(update={"kv": None})
        if manifest.attention is not None and manifest.attention.params is not None:
            log.warning("save_pretrained leaves out the parameters of the attention; rarefy.save writes them too.")
            manifest = manifest.model_copy(update={"attention": None})
        self.quantization_config = RarefyConfig.of(manifest)
        model.config.quantization_config = self.quantization_config
        # What is offloaded or spread over processes cannot be hashed here; codes and scales never are.
        here = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if type(tensor) is torch.Tensor and tensor.device.type != "meta"
        }
        return None, metadata(manifest, here)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters train over the frozen codes

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, _ in list(swap.compressed(model)):
            swap.restore_(model, name, dtype)
        return model


def prepare_(model: nn.Module, manifest: Manifest, files: list[Path]) -> None:
    """Check ``files`` against the manifest and ``model`` (on the meta device), then put empty compressed modules in.

    Raises CheckpointError before any tensor is read into the model.
    """
    wanted = manifest.terms()
    places = {site.name: site for site in swap.sites(model)}
    for name in wanted:
        if name not in places:
            raise CheckpointError(f"quantization_config compresses '{name}', which this model does not have.")
    try:
        layouts = {name: layer_layout(terms, places[name].shape) for name, terms in wanted.items()}
    except FormatError as failure:
        raise CheckpointError(f"quantization_config: {failure}.") from None
    replaced = {places[name].parameter for name in wanted}
    dense = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in replaced}
    headers = read_headers(files)
    sizes = expected_sizes(headers, layouts, dense, may_be_absent(model))
    check_digests(headers, manifest, [f"{module}.{name}" for module, layout in layouts.items() for name in layout])
    in_float32 = _kept_in_float32(model)
    for name, terms in wanted.items():
        with torch.device("meta"):
            empty = [
                term.empty(places[name].shape, _own_sizes(sizes[name], f"terms.{index}."))
                for index, term in enumerate(terms)
            ]
        keep = in_float32 is not None and in_float32.search(places[name].parameter)
        swap.swap_(model, places[name], empty, torch.float32 if keep else None)
    if any(places[name].kind == "experts" for name in wanted):
        use_expert_loop_(model)


def reread_(model: nn.Module, files: list[Path]) -> None:
    """Read again what a loader cast: a family's list of modules to keep in float32 (T5's ``wo``) takes codes along."""
    from safetensors import safe_open

    cast = {
        f"{name}.terms.{index}.{label}": (term, label)
        for name, module in swap.compressed(model)
        for index, term in enumerate(module.terms)
        for label, entry in term.spec.layout(term.shape).items()  # type: ignore[operator, union-attr, arg-type]
        if term.get_buffer(label).dtype != entry.dtype  # type: ignore[operator]
    }
    for file in files if cast else ():
        with safe_open(file, framework="pt") as opened:
            for name in cast.keys() & set(opened.keys()):
                term, label = cast[name]
                owner, _, last = label.rpartition(".")
                device = term.get_buffer(label).device
                term.get_submodule(owner)._buffers[last] = opened.get_tensor(name).to(device)


def _kept_in_float32(model: Any) -> re.Pattern[str] | None:
    """What the parameters of ``model`` are called that its class keeps in float32 whatever dtype is asked for."""
    plan = model._get_dtype_plan(model.dtype) if hasattr(model, "_get_dtype_plan") else model.dtype_plan
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in plan)) if plan else None


def keep_names_(model: Any) -> None:
    """Save under the names in memory: converting back to a family's older names would take compressed stacks apart."""
    model._weight_conversions = []


def attach_(model: Any, manifest: Manifest) -> None:
    """Make a model that was just compressed in memory look as if it had been loaded, so that it saves and trains."""
    if not hasattr(model, "config"):
        raise UnsupportedError(f"{type(model).__name__} is not a Transformers model; save its state_dict instead.")
    config = RarefyConfig.of(manifest)
    model.config.quantization_config = config
    model.hf_quantizer = RarefyQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    keep_names_(model)
    _connect(model)
    if any(isinstance(module, swap.CompressedStack) for module in model.modules()):
        use_expert_loop_(model)


def _own_sizes(sizes: dict[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}


def _connect(model: nn.Module) -> None:
    try:
        swap.resolve_shared(model)
    except FormatError as failure:
        raise CheckpointError(f"quantization_config: {failure}.") from None
