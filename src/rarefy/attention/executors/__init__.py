"""Executors: exact attention over the blocks of a map, all with the same result."""

import functools

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.executors.base import Executor, executors
from rarefy.attention.executors.cpu import Cpu
from rarefy.attention.executors.fa4 import FlashAttention4
from rarefy.attention.executors.flex import Flex
from rarefy.attention.executors.native import Native
from rarefy.attention.executors.reference import Reference
from rarefy.attention.executors.trainable import Trainable
from rarefy.attention.executors.triton import Triton
from rarefy.attention.measured import DEFAULT, measured
from rarefy.attention.policy import Phase
from rarefy.attention.source import Source
from rarefy.core.errors import UnsupportedError
from rarefy.core.logs import logger

__all__ = [
    "Cpu", "Executor", "FlashAttention4", "Flex", "Native", "Reference", "Trainable", "Triton", "choose", "executors",
    "limit",
]  # fmt: skip


log = logger(__name__)


def limit(
    device: torch.device, phase: Phase, tokens: int, *, blocks: tuple[int, int] | None = None, name: str = "auto",
    estimator: str = "",
) -> float:  # fmt: skip
    """The density above which dense attention was measured to be faster than executor ``name`` (``auto``: the fastest
    that is here and takes ``blocks`` of so many queries by so many keys; None: of any size), after what the estimator
    of that label takes."""
    known = measured(device, phase, tokens)
    left = max(0.0, 1 - known.estimators.get(estimator, 0.0))
    tables = (known.executors, DEFAULT.executors)
    for table in tables:
        if name in table:
            return table[name] * left
    for other, density in ((other, density) for table in tables for other, density in table.items()):
        executor = executors.get(other)()
        fits = blocks is None or executor.tiles(*blocks)
        if phase in executor.phases and fits and executor.missing(device) is None:
            return density * left
    return left


def choose(
    name: str,
    query: Tensor,
    source: Source,
    block_map: BlockMap,
    softcap: float | None = None,
    phase: Phase = "prefill",
) -> Executor:
    """The executor ``name``, or (``auto``) the fastest by the measured table that can serve. Raises UnsupportedError
    where ``name`` cannot, and OptionError where there is no such executor."""
    if name != "auto":
        executor = executors.get(name)()
        reason = executor.refusal(query, source, block_map, softcap)
        if reason is not None:
            raise UnsupportedError(f"Executor '{name}' cannot run this attention: {reason}; use 'auto'.")
        return executor
    if query.requires_grad:
        return Trainable()
    tokens = source.length * (query.shape[0] if phase == "decode" else 1)
    refusals: list[str] = []
    for other in dict.fromkeys((*measured(query.device, phase, tokens).executors, *DEFAULT.executors)):
        executor = executors.get(other)()
        reason = executor.refusal(query, source, block_map, softcap)
        if reason is None:
            if isinstance(executor, Reference):
                _tell_slow(query.device.type, tuple(refusals))
            return executor
        refusals.append(f"{other}: {reason}")
    return Reference()


@functools.cache
def _tell_slow(device: str, refusals: tuple[str, ...]) -> None:
    """Say once that attention is right and slow, and why nothing faster runs."""
    why = "; ".join(refusals) or "it is the first of the measured table"
    log.warning("Sparse attention runs by the reference on this %s, which is slow (%s).", device, why)
