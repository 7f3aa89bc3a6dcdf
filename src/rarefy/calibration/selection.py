"""Which layers a recipe compresses, and why the others are left alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rarefy.contracts import Recipe, Rule
from rarefy.core.errors import RecipeError
from rarefy.layers.swap import Site, is_experts, sites

# Last parts of names whose layers choose or label rather than transform: small, and sensitive beyond their size.
HEADS = ("lm_head", "embed_out", "classifier", "score", "qa_outputs")
ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Selection:
    """``chosen``: sites with the rule that covers them. ``skipped``: site name -> the reason it stays dense."""

    chosen: list[tuple[Site, Rule]]
    skipped: dict[str, str]


def select(model: nn.Module, recipe: Recipe) -> Selection:
    """Match the rules of ``recipe`` to the linear layers and experts of ``model`` (which may be on the meta device).

    Heads and routers stay dense unless a target names them (by exact name or regular expression), weights that other
    layers share always do. Raises RecipeError when nothing is chosen, or an exactly named target cannot be.
    """
    return select_sites(list(sites(model)), recipe, _output_head(model), _shared(model), _other_experts(model))


def select_sites(
    found: list[Site],
    recipe: Recipe,
    head: str | None = None,
    shared: Mapping[str, str] | None = None,
    others: Mapping[str, str] | None = None,
) -> Selection:
    """``select`` among given sites. ``head``: the output head's name; ``shared``: site name -> the parameter that its
    weight also is; ``others``: names that cannot be compressed -> the reason."""
    chosen: list[tuple[Site, Rule]] = []
    skipped: dict[str, str] = dict(others or {})
    for site in found:
        rule = recipe.rule_of(site)
        if rule is None:
            skipped[site.name] = "no rule covers it"
            continue
        if other := (shared or {}).get(site.name):
            if site.name in rule.targets:
                raise RecipeError(f"Target '{site.name}' shares its weight with '{other}'; leave both dense.")
            skipped[site.name] = f"shares its weight with '{other}'"
            continue
        reason = _kept_dense(site.name, head)
        if reason and "Linear" in rule.targets and not _named(rule, site.name):
            skipped[site.name] = reason
            continue
        chosen.append((site, rule))
    _check_names(recipe, {site.name for site in found})
    if not chosen:
        raise RecipeError("No layer of this model is covered by the recipe; check its targets and ignore.")
    return Selection(chosen, skipped)


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Tied parameter name -> name of the parameter it shares its storage with."""
    owners: dict[int, str] = {}
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name and first not in tied:
            tied.setdefault(name, first)
    return tied


def may_be_absent(model: nn.Module) -> set[str]:
    """Names that a whole checkpoint may lack: tied parameters, and what the model's class makes anew by itself."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    made = {name for name in model.state_dict() if any(re.search(pattern, name) for pattern in patterns)}
    return made | set(getattr(model, "_keys_to_ignore_on_save", None) or ()) | set(tied_parameters(model))


def _shared(model: nn.Module) -> dict[str, str]:
    """Sites whose weight is also another parameter, but not an output head tied to its embedding: it can be untied."""
    tied = tied_parameters(model)
    partners = {owner: target for target, owner in tied.items()} | tied
    head = _output_head(model)
    return {
        site.name: partners[site.parameter]
        for site in sites(model)
        if site.parameter in partners and not (site.name == head and site.parameter in tied)
    }


def _other_experts(model: nn.Module) -> dict[str, str]:
    """Stacked experts that a model multiplies in a way that compressed ones do not serve, with the reason."""
    return {
        f"{name}.{label}": "experts that the model multiplies as one dense tensor"
        for name, module in model.named_modules()
        if hasattr(module, "num_experts") and not is_experts(module)
        for label, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def _output_head(model: Any) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def _kept_dense(name: str, head: str | None) -> str | None:
    last = name.rpartition(".")[2]
    if name == head or last in HEADS:
        return "output head"
    if last in ROUTERS:
        return "router"
    return None


def _named(rule: Rule, name: str) -> bool:
    return rule.model_copy(update={"targets": tuple(target for target in rule.targets if target != "Linear")}).covers(
        Site(name, "linear", (), name)
    )


def _check_names(recipe: Recipe, names: set[str]) -> None:
    for rule in recipe.rules:
        for target in rule.targets:
            if target != "Linear" and not target.startswith("re:") and target not in names:
                raise RecipeError(f"Target '{target}' is not a linear layer of this model; see 'rarefy inspect MODEL'.")
