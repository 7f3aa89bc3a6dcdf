"""PEFT: adapters train over compressed layers as they are; merging one means compressing the sum anew."""

from __future__ import annotations

import time
from typing import Any

import torch

from rarefy.calibration.data_free import refuse_data
from rarefy.calibration.report import LayerReport, Ledger
from rarefy.contracts import Recipe, Rule
from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.core.logs import logger
from rarefy.formats.bytes import total
from rarefy.integrations.transformers.models import manifest_of, stored_tensors
from rarefy.integrations.transformers.quantizer import attach_
from rarefy.layers import swap
from rarefy.layers.linear import CompressedLinear
from rarefy.layers.manifest import Manifest
from rarefy.solvers.rtn import relative_error

log = logger(__name__)


@torch.no_grad()
def merge_adapter(model: Any, recipe: Recipe | None) -> Any:
    """See ``rarefy.merge_adapter``."""
    try:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise OptionError("Merging an adapter needs the package 'peft'; install rarefy[peft].") from None
    if not isinstance(model, PeftModel):
        raise OptionError(f"{type(model).__name__} carries no PEFT adapter; there is nothing to merge.")
    base = model.get_base_model()
    manifest = manifest_of(base)
    adapted = {
        name: layer
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), CompressedLinear)
    }
    if not adapted:
        raise OptionError("No adapter sits on a compressed layer; call the model's own merge_and_unload().")
    rules = {name: _rule(manifest, name, recipe) for name in adapted}
    sums = {name: _sum(name, layer) for name, layer in adapted.items()}
    for name, layer in adapted.items():
        solution = rules[name].recipe().solve(name, sums[name])
        error = relative_error(sums[name], solution.terms)
        log.info("%s: compressed anew, relative error %.4f", name, error)
        old = layer.get_base_layer()
        old.terms = torch.nn.ModuleList(term.to(old.device) for term in solution.terms)
    dense = model.unload()
    attach_(dense, _rebuilt(dense, manifest, rules, recipe))
    return dense


def _sum(name: str, layer: Any) -> torch.Tensor:
    base = layer.get_base_layer()
    weight: torch.Tensor = base.decode()
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        if getattr(layer, "use_dora", {}).get(adapter) or getattr(layer, "lora_variant", {}).get(adapter):
            raise UnsupportedError(f"The adapter on '{name}' is not a plain LoRA, so it cannot be added; train a plain one.")
        weight = weight + layer.get_delta_weight(adapter).to(weight)
    return weight


def _rule(manifest: Manifest, name: str, recipe: Recipe | None) -> Rule:
    if recipe is not None:
        refuse_data(recipe)
        return recipe.rules[0]
    for entry in manifest.rules:
        if name in entry.modules:
            rule = Rule(method=entry.method, options=entry.options)
            refuse_data(Recipe(name=manifest.recipe, rules=(rule,)))
            return rule
    raise OptionError(f"The checkpoint does not say how '{name}' was compressed; pass recipe=.")


def _rebuilt(model: Any, manifest: Manifest, rules: dict[str, Rule], recipe: Recipe | None) -> Manifest:
    """The manifest of the merged model: layers keep their rule unless they were compressed by another one."""
    every = recipe.rules if recipe is not None else tuple(Rule(method=entry.method, options=entry.options) for entry in manifest.rules)
    ledger = Ledger(Recipe(name=manifest.recipe, rules=every, execution=manifest.execution), notes=["an adapter was merged"])
    start = time.monotonic()
    for name, module in swap.compressed(model):
        terms = [term for term in module.terms]
        shape = tuple(terms[0].shape)  # type: ignore[arg-type]
        size = total([term.byte_count() for term in terms]).total  # type: ignore[operator]
        count = int(torch.Size(shape).numel())
        rule = rules.get(name) or _rule(manifest, name, None)
        layer = LayerReport(
            name=name, method=rule.method, shape=shape, bits_per_weight=size * 8 / count, relative_error=0.0,
            seconds=time.monotonic() - start,
        )  # fmt: skip
        ledger.add(layer, rule, terms)  # type: ignore[arg-type]
    stored = sum(tensor.numel() * tensor.element_size() for _, tensor in stored_tensors(model))
    return ledger.manifest(stored, manifest.report.dense_bytes if manifest.report else stored)
