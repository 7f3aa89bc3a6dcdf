"""What every executor does: exact attention over the blocks of a map."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.policy import Phase
from rarefy.attention.source import Source
from rarefy.core.errors import OptionError
from rarefy.core.registry import Registry


class Executor(ABC):
    """Attention of queries over the blocks that a map lists. What it cannot do it says in `refusal`; ``phases``: passes
    that it can be for."""

    name: ClassVar[str]
    phases: ClassVar[tuple[Phase, ...]] = ("prefill", "decode")

    def missing(self, device: torch.device) -> str | None:
        """Why nothing can be executed on ``device``, as part of a sentence; None where something can."""
        return None

    def tiles(self, block_q: int, block_k: int) -> bool:
        """Whether maps of blocks of ``block_q`` queries by ``block_k`` keys fit it, whatever else it refuses."""
        return True

    @abstractmethod
    def refusal(self, query: Tensor, source: Source, block_map: BlockMap, softcap: float | None = None) -> str | None:
        """Why this map cannot be executed here, as part of a sentence; None where it can."""

    @abstractmethod
    def run(
        self, query: Tensor, source: Source, block_map: BlockMap, scaling: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of ``query [B, H, Q, D]``: the result in its shape and dtype and its log-sum-exp float32 ``[B, H,
        Q]``. Tokens of blocks that are not listed are not read. A query that sees nothing gives zero and ``-inf``."""


executors: Registry[Executor] = Registry("attention executor", OptionError)
