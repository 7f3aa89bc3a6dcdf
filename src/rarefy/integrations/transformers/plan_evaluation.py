"""Sparse attention as people write it down, and models that attend so as candidates of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rarefy.core.errors import OptionError
from rarefy.evaluation.candidates import Candidate
from rarefy.evaluation.forward import new_cache
from rarefy.integrations.transformers import kv_setup
from rarefy.integrations.transformers.kv_evaluation import parse_choice
from rarefy.integrations.transformers.plan_fitting import CALIBRATION, find_attention
from rarefy.integrations.transformers.plan_setup import (
    AttentionSetup,
    attention_recipe,
    install_,
    share_read,
    uninstall_,
)

DENSE = "dense"


def check_plans(plans: Sequence[str]) -> None:
    """Raise RecipeError or OptionError for a plan that cannot be; a typo shows before a model is loaded."""
    for text in plans:
        name, options = parse_choice("--attention", text)
        if name != DENSE and "params" not in options:
            attention_recipe(name, {key: value for key, value in options.items() if key not in CALIBRATION})


def set_plan(model: Any, text: str) -> AttentionSetup | None:
    """Let ``model`` attend by the plan ``text``, such as ``"xattention:mass=0.9"``; ``"dense"`` ends every plan."""
    name, options = parse_choice("--attention", text)
    if name == DENSE:
        uninstall_(model)
        return None
    given = {key: options.pop(key, usual) for key, usual in CALIBRATION.items()}
    return install_(model, find_attention(model, name, options=options, **given))


def dense_cache(model: Any) -> Any:
    """An empty 16-bit cache for ``model``: the one that keeps a plan's state where there is a plan that decodes."""
    setup: Any = getattr(model, kv_setup.SETUP, None)
    return new_cache(model, setup if setup is not None and setup.name == "identity" else None)


def with_plans(candidates: Sequence[Candidate], plans: Sequence[str], *, reads_cache: bool = False) -> list[Candidate]:
    """Every candidate with every plan; without plans the candidates as they are. ``reads_cache``: tokens come in
    several passes, for which a plan may keep state. Raises OptionError for models in memory, which cannot be dense and
    sparse in one pass, and RecipeError for unknown plans."""
    check_plans(plans)
    if not plans:
        return list(candidates)
    if any(candidate.load is None for candidate in candidates):
        raise OptionError("Plans are measured on models that are named; call rarefy.set_attention for one in memory.")
    return [_planned(candidate, text, reads_cache) for candidate in candidates for text in plans]


def _planned(candidate: Candidate, text: str, reads_cache: bool) -> Candidate:
    load = candidate.load
    assert load is not None

    def open_it() -> Any:
        model = load()
        set_plan(model, text)
        return model

    # Parameters in a file may change under the same name, so nothing is kept of them.
    kept = None if candidate.identity is None or "params=" in text else f"{candidate.identity}, {text}"
    cache = candidate.cache or (dense_cache if reads_cache else None)
    return replace(
        candidate, name=f"{candidate.name}, {text}", load=open_it, cache=cache, density=_density, identity=kept
    )


def _density(model: Any) -> float:
    """`share_read` of a model that was asked for with a plan; 1 where that was ``dense``."""
    found = share_read(model)
    return 1.0 if found is None else found
