"""Sparse attention as people write it down, and models that attend so as candidates of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rarefy.core.errors import OptionError
from rarefy.evaluation.candidates import Candidate
from rarefy.integrations.transformers.kv_evaluation import parse_choice
from rarefy.integrations.transformers.plan_fitting import CALIBRATION, find_attention
from rarefy.integrations.transformers.plan_setup import SETUP, AttentionSetup, attention_recipe, install_


def set_plan(model: Any, text: str) -> AttentionSetup | None:
    """Let ``model`` attend by the plan ``text``, such as ``"xattention:mass=0.9"``; ``"dense"`` changes nothing."""
    name, options = parse_choice("--attention", text)
    if name == "dense":
        return None
    given = {key: options.pop(key, usual) for key, usual in CALIBRATION.items()}
    return install_(model, find_attention(model, name, options=options, **given))


def with_plans(candidates: Sequence[Candidate], plans: Sequence[str]) -> list[Candidate]:
    """Every candidate with every plan; without plans the candidates as they are. Raises OptionError for models in
    memory, which cannot be dense and sparse in one pass, and RecipeError for unknown plans."""
    for text in plans:  # a typo shows before a model is loaded
        name, options = parse_choice("--attention", text)
        if name != "dense" and "params" not in options:
            attention_recipe(name, {key: value for key, value in options.items() if key not in CALIBRATION})
    if not plans:
        return list(candidates)
    if any(candidate.load is None for candidate in candidates):
        raise OptionError("Plans are measured on models that are named; call rarefy.set_attention for one in memory.")
    return [_planned(candidate, text) for candidate in candidates for text in plans]


def _planned(candidate: Candidate, text: str) -> Candidate:
    load = candidate.load
    assert load is not None

    def open_it() -> Any:
        model = load()
        set_plan(model, text)
        return model

    return replace(candidate, name=f"{candidate.name}, {text}", load=open_it, density=_density, identity=None)


def _density(model: Any) -> float:
    setup: AttentionSetup | None = getattr(model, SETUP, None)
    return 1.0 if setup is None else setup.report.density()
