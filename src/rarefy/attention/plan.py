"""A plan: estimate which blocks of keys matter, select among them, execute attention over those."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.call import Call
from rarefy.attention.estimators import Estimator
from rarefy.attention.executors import choose, limit
from rarefy.attention.policy import Phase, Policy, phase_of
from rarefy.attention.report import PlanReport
from rarefy.attention.selectors import Selector, newest, select_map

LEAST = -1e30  # a score below all others, of a block that may be chosen


@dataclass(frozen=True)
class AttentionShape:
    """Attention of one layer: number ``layer`` of ``layers``, query heads, KV heads, channels of keys."""

    heads: int
    kv_heads: int
    channels: int
    layer: int = 0
    layers: int = 1


@dataclass(frozen=True)
class AttentionPlan:
    """How one layer attends. ``heads``: whether lists are made for each ``query`` head, or for each ``kv`` head, which
    decoding always does, since its time is that of reading keys and values. ``executor``: a name, or ``auto``.
    ``layers``: how many the model has. ``decode_selector``: what chooses while decoding, if it is another rule."""

    estimator: Estimator
    selector: Selector
    policy: Policy = field(default_factory=Policy)
    block_q: int = 64
    block_k: int = 64
    heads: Literal["query", "kv"] = "query"
    executor: str = "auto"
    layers: int = 1
    decode_selector: Selector | None = None

    def attend(self, call: Call, report: PlanReport | None = None) -> Tensor | None:
        """Attention of ``call.query``, in its shape and dtype; None where it should be dense, which the report says."""
        report = report or PlanReport()
        found = self.map(call, report)
        if found is None:
            return None
        executor = choose(self.executor, call.query, call.source, found, call.softcap, phase_of(call.query.shape[2]))
        with report.part(call.layer, "execute", call.query.device):
            output, _ = executor.run(call.query, call.source, found, call.scaling, call.softcap)
        report.layer(call.layer).executors[executor.name] += 1
        return output

    def selector_of(self, phase: Phase) -> Selector:
        """What chooses blocks in a phase."""
        return self.selector if phase == "prefill" or self.decode_selector is None else self.decode_selector

    def prepared(self, call: Call) -> Call:
        """``call`` with its phase and the heads that lists are made for."""
        phase = phase_of(call.query.shape[2])
        by_query = self.heads == "query" and phase == "prefill"
        return replace(call, phase=phase, mask_heads=call.heads if by_query else call.source.heads)

    def map(self, call: Call, report: PlanReport | None = None) -> BlockMap | None:
        """The blocks that ``call`` would read; None where it should be dense. What estimators keep is brought up to
        date either way."""
        report = report or PlanReport()
        own, call = report.layer(call.layer), self.prepared(call)
        highest, denser = self.limit(call), "dense is faster here"
        if highest:
            denser = f"denser than {highest:g}"
        known = self.selector_of(call.phase).expected(-(-call.reach.keys // self.block_k))
        reason = self.policy.dense(call.phase, call.reach.keys, call.layer, self.layers)
        if reason is None and (not highest or (known is not None and known > highest)):
            reason = denser
        # To look at what was chosen makes a GPU wait, which decoding cannot afford.
        if reason is None and known is None and call.phase == "decode" and highest < 1:
            reason = "its density is not known beforehand"
        if reason is not None:
            own.dense[reason] += 1
            with report.part(call.layer, "estimate", call.query.device):
                self.estimator.observe(call, self.block_k)
            return None
        found = self._chosen(call, report)
        if report.keep_maps:
            report.maps[call.layer] = found
        if known is None and highest < 1 and float(found.density().mean()) > highest:
            own.dense[denser] += 1
            return None
        own.count(found)
        return found

    def _chosen(self, call: Call, report: PlanReport) -> BlockMap:
        """The map of a pass that is to be sparse."""
        device, selector = call.query.device, self.selector_of(call.phase)
        if newest.serves(selector, self.policy, call, self.block_k):
            with report.part(call.layer, "estimate", device):
                products = self.estimator.products(call, self.block_k)
            if products is not None and newest.fits(products):
                with report.part(call.layer, "select", device):
                    return newest.newest_map(selector, products, self.policy, call, self.block_k)
        blocks = call.reach.blocks(min(self.block_q, call.query.shape[2]), self.block_k, device)
        with report.part(call.layer, "estimate", device):
            scores = self.estimator.scores(call, blocks)
            if call.reach.uneven:  # what the estimator did not see of a block's queries is in reach all the same
                scores = scores.clamp(min=LEAST)
        with report.part(call.layer, "select", device):
            forced = self.policy.forced(call.reach, blocks, call.layer, call.mask_heads, call.heads)
            return select_map(selector, scores, blocks, forced, call.reach)

    def limit(self, call: Call) -> float:
        """The density above which ``call`` stays dense."""
        if self.policy.max_density is not None:
            return self.policy.max_density
        rows = call.query.shape[0] if call.phase == "decode" else 1
        return limit(
            call.query.device, call.phase, call.reach.keys * rows, name=self.executor, estimator=self.estimator.label,
            blocks=(min(self.block_q, call.query.shape[2]), self.block_k),
        )  # fmt: skip
