"""Quest (Tang et al. 2024): pages of keys by the bound that their least and greatest numbers give.

Of every page of ``block_k`` keys the channel-wise minimum m and maximum M are kept (section 3.2). For a query q no key
of the page can score more than sum_c max(q_c m_c, q_c M_c); the pages with the greatest bound are read, in decoding
only, and the first two layers, which attend everywhere, stay dense. The paper chooses pages for every query head; here
heads that share keys choose together, by their best bound, since a page costs the same for one of them or all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from rarefy.attention.estimators import Extremes
from rarefy.attention.plan import AttentionShape
from rarefy.attention.selectors import TopK
from rarefy.contracts import AttentionRecipe, attention_recipes


@attention_recipes.register("quest_pages")
class QuestPages(AttentionRecipe):
    """``budget``: tokens to read; or ``density``: share of all pages, where that is given."""

    budget: int = Field(2048, ge=1)
    density: float | None = Field(None, gt=0, le=1)
    block_k: int = Field(16, ge=1)
    dense_layers: tuple[int, ...] = (0, 1)
    phases: Literal["both", "prefill", "decode"] = "decode"

    def estimator(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> Extremes:
        return Extremes()

    def selector(self, shape: AttentionShape, params: Mapping[str, Tensor]) -> TopK:
        if self.density is not None:
            return TopK(self.density, least=3)
        return TopK(count=-(-self.budget // self.block_k), least=3)
