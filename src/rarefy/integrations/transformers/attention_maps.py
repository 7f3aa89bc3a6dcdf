"""Maps of what a plan chooses, from a model as people name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from rarefy.attention.call import Call
from rarefy.core.devices import Device
from rarefy.core.errors import OptionError
from rarefy.evaluation.attention import AttentionMaps, Choice, examine
from rarefy.evaluation.protocol import bos_token
from rarefy.integrations.transformers import plan_setup
from rarefy.integrations.transformers.kv_evaluation import parse_choice
from rarefy.integrations.transformers.listening import listen
from rarefy.integrations.transformers.plan_fitting import CALIBRATION, find_attention
from rarefy.integrations.transformers.subjects import open_subjects
from rarefy.sources.texts import open_text
from rarefy.sources.windows import tokenize, windows


def attention_maps(
    model: Any,
    plan: str | None,
    *,
    text: str | Path,
    tokens: int,
    layers: Sequence[int] | None,
    device: Device,
    tokenizer: Any,
) -> AttentionMaps:
    """``rarefy.attention_maps``."""
    subjects = open_subjects([model], None, device=device, tokenizer=tokenizer)
    candidate = subjects.candidates[0]
    loaded = candidate.open()
    setup: plan_setup.AttentionSetup | None = getattr(loaded, plan_setup.SETUP, None)
    if plan is not None:
        name, options = parse_choice("--plan", plan)
        given = {key: options.pop(key, usual) for key, usual in CALIBRATION.items()}
        given["tokenizer"] = subjects.tokenizer
        setup = find_attention(loaded, name, options=options, **given)
    if setup is None:
        raise OptionError(f"'{candidate.name}' has no attention plan of its own; name one, such as oracle (--plan).")
    modules = plan_setup.prepared(loaded)
    wanted = set(modules if layers is None else layers)
    if not wanted <= set(modules):
        raise OptionError(f"Layer {min(wanted - set(modules))} does not exist; there are {len(modules)} layers.")
    shapes = {layer: plan_setup.shape_of(module, loaded, len(modules)) for layer, module in modules.items()}
    found: dict[int, Choice] = {}

    def hear(call: Call) -> None:
        if call.layer in wanted:
            choice = examine(setup.plan(shapes[call.layer], call.query.device), call)
            found[call.layer] = Choice(**{field.name: getattr(choice, field.name).cpu() for field in fields(choice)})

    source = open_text(text, "evaluation")
    row = windows(tokenize(subjects.tokenizer, source.text), tokens, 1, bos_token(subjects.tokenizer, None))
    with torch.inference_mode():
        listen(loaded, row, hear)
    recipe = setup.recipe
    options = recipe.model_dump(exclude_defaults=True)
    shown = setup.name + (":" if options else "") + ",".join(f"{key}={value}" for key, value in options.items())
    return AttentionMaps(candidate.name, shown, source.name, tokens, recipe.block_q, recipe.block_k, found)
