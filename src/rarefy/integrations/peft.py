"""PEFT: adapters train over compressed layers as they are; merging one means compressing the sum anew."""

from __future__ import annotations

import time
from typing import Any

import torch

from rarefy.calibration.data_free import refuse_data
from rarefy.calibration.report import LayerReport, Ledger
from rarefy.contracts import Layer, Recipe, Rule
from rarefy.core.errors import FormatError, OptionError, RecipeError, UnsupportedError
from rarefy.core.logs import logger
from rarefy.formats.bytes import total
from rarefy.formats.terms import Term
from rarefy.integrations.transformers.models import manifest_of, stored_tensors
from rarefy.integrations.transformers.quantizer import attach_
from rarefy.layers import swap
from rarefy.layers.linear import CompressedLinear
from rarefy.layers.manifest import Manifest
from rarefy.layers.swap import Site
from rarefy.recipes import discover
from rarefy.solvers.rtn import relative_error

log = logger(__name__)


@torch.no_grad()
def merge_adapter(model: Any, recipe: Recipe | None) -> Any:
    """See ``rarefy.merge_adapter``."""
    try:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise OptionError("Merging an adapter needs the package 'peft'; run: pip install peft") from None
    if not isinstance(model, PeftModel):
        raise OptionError(f"{type(model).__name__} carries no PEFT adapter; there is nothing to merge.")
    base = model.get_base_model()
    manifest = manifest_of(base)
    tuners = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    adapted = {
        name: layer
        for name, layer in tuners.items()
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), CompressedLinear)
    }
    if not adapted:
        raise OptionError("No LoRA adapter sits on a compressed layer; call the model's own merge_and_unload().")
    discover()
    rules = {name: _rule(manifest, name, recipe) for name in adapted}
    # All are solved before the first is replaced: one that cannot be leaves the model as it was.
    solved = {name: _solve(name, layer, rules[name]) for name, layer in adapted.items()}
    for name, layer in tuners.items():
        if name in solved:
            layer.get_base_layer().terms = torch.nn.ModuleList(solved[name])
        elif not layer.merged:
            layer.merge(safe_merge=True)  # an adapter on a dense layer is simply added
    dense = model.unload()
    attach_(dense, _rebuilt(dense, manifest, rules, recipe))
    return dense


def _solve(name: str, layer: Any, rule: Rule) -> list[Term]:
    weight = _sum(name, layer)
    try:
        terms = rule.recipe().solve(Layer(name, weight)).terms
    except FormatError as failure:
        raise RecipeError(f"Layer '{name}': {failure}") from None
    log.info("%s: compressed anew, relative error %.4f", name, relative_error(weight, terms))
    return [term.to(weight.device) for term in terms]


def _sum(name: str, layer: Any) -> torch.Tensor:
    base = layer.get_base_layer()
    weight: torch.Tensor = base.decode()
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        if any(getattr(layer, kind, {}).get(adapter) for kind in ("use_dora", "lora_variant", "lora_bias")):
            raise UnsupportedError(
                f"The adapter on '{name}' is not a plain LoRA, so it cannot be added; train a plain one."
            )
        weight = weight + layer.get_delta_weight(adapter).to(weight)
    return weight


def _rule(manifest: Manifest, name: str, recipe: Recipe | None) -> Rule:
    """The rule that compresses layer ``name`` anew: that of ``recipe``, or the one it was compressed by."""
    rule = _recorded(manifest, name) if recipe is None else recipe.rule_of(Site(name, "linear", (), name))
    if rule is None:
        raise OptionError(f"Layer '{name}' has an adapter, but the recipe has no rule for it; pass one that covers it.")
    refuse_data(Recipe(name=manifest.recipe, rules=(rule,)))
    return rule


def _recorded(manifest: Manifest, name: str) -> Rule | None:
    entries = (entry for entry in manifest.rules if name in entry.modules)
    return next((Rule(method=entry.method, options=entry.options) for entry in entries), None)


def _rebuilt(model: Any, manifest: Manifest, rules: dict[str, Rule], recipe: Recipe | None) -> Manifest:
    """The manifest of the merged model: layers keep their rule unless they were compressed by another one."""
    every = (*(recipe.rules if recipe else ()), *(Rule(method=e.method, options=e.options) for e in manifest.rules))
    ledger = Ledger(
        Recipe(name=manifest.recipe, rules=every, execution=manifest.execution), notes=["an adapter was merged"]
    )
    start = time.monotonic()
    for name, module in swap.compressed(model):
        terms = [term for term in module.terms]
        shape = tuple(terms[0].shape)  # type: ignore[arg-type]
        size = total([term.byte_count() for term in terms]).total  # type: ignore[operator]
        count = int(torch.Size(shape).numel())
        rule = rules.get(name) or _recorded(manifest, name)
        assert rule is not None  # every compressed module is in its manifest
        layer = LayerReport(
            name=name, method=rule.method, shape=shape, bits_per_weight=size * 8 / count, relative_error=0.0,
            seconds=time.monotonic() - start,
        )  # fmt: skip
        ledger.add(layer, rule, terms)  # type: ignore[arg-type]
    stored = sum(tensor.numel() * tensor.element_size() for _, tensor in stored_tensors(model))
    version = max(manifest.recipe_version, *(rule.recipe().recipe_version for rule in rules.values()))
    return ledger.manifest(stored, manifest.report.dense_bytes if manifest.report else stored, version)
