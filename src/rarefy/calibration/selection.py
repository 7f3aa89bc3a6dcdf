"""Which layers a recipe compresses, and why the others are left alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rarefy.contracts import Recipe, Rule
from rarefy.core.errors import RecipeError
from rarefy.layers.swap import Site, sites

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

    Heads and routers stay dense unless a target names them (by exact name or regular expression). Raises RecipeError
    when nothing is chosen, or when an exactly named target does not exist.
    """
    head = _output_head(model)
    chosen: list[tuple[Site, Rule]] = []
    skipped: dict[str, str] = {}
    found = list(sites(model))
    for site in found:
        rule = recipe.rule_of(site)
        if rule is None:
            skipped[site.name] = "no rule covers it"
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


def _output_head(model: nn.Module) -> str | None:
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
