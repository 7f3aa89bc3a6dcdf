"""What attention is given in passes that stay dense, for those who learn from it or look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.report import PlanReport
from rarefy.integrations.transformers import attention
from rarefy.integrations.transformers.plan_setup import prepared


class _Ear:
    """Stands where a layer's plan would, and lets attention be dense."""

    def __init__(self, hear: Callable[[Call], None]):
        self._hear = hear

    def attend(self, call: Call, report: PlanReport) -> None:
        self._hear(call)


@contextmanager
def listening(model: Any, hear: Callable[[Call], None]) -> Iterator[None]:
    """Within, every layer of ``model`` attends densely, and ``hear`` is called before with what it is given. Raises
    UnsupportedError for models whose attention is not known."""
    modules = prepared(model).values()
    before = [vars(module).get(attention.PLAN) for module in modules]
    try:
        for module in modules:
            object.__setattr__(module, attention.PLAN, (_Ear(hear), PlanReport()))
        yield
    finally:
        for module, plan in zip(modules, before, strict=True):
            if plan is None:
                delattr(module, attention.PLAN)
            else:
                object.__setattr__(module, attention.PLAN, plan)


@torch.no_grad()
def listen(model: Any, tokens: Tensor, hear: Callable[[Call], None]) -> None:
    """One pass over ``tokens [B, T]`` without a cache and without the head, as `listening` has it."""
    body = getattr(model, "base_model", model)
    with listening(model, hear):
        body(input_ids=tokens.to(model.device), use_cache=False)
