"""The executor for processors: torch's flash attention over the gathered blocks of one row after another.

A row of all heads is one call, so a pass is a few hundred of them; threads take rows and not parts of a call, since a
call is too short to be worth waking others for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.compact import compact
from rarefy.attention.executors.base import Executor, executors
from rarefy.attention.source import Source


@executors.register("cpu")
class Cpu(Executor):
    """Every reach; lists by KV head are the fastest, since keys are then gathered once for all heads of a group."""

    name = "cpu"

    def missing(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it runs on a processor"

    def refusal(self, query: Tensor, source: Source, block_map: BlockMap, softcap: float | None = None) -> str | None:
        if (reason := self.missing(query.device)) is not None:
            return reason
        if softcap is not None or block_map.level is not None:
            return "it does not bend scores and knows no levels"
        return "it keeps no gradients" if query.requires_grad and torch.is_grad_enabled() else None

    def run(
        self, query: Tensor, source: Source, block_map: BlockMap, scaling: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        source, block_map = compact(source, block_map)
        batch, heads, count, channels = query.shape
        if block_map.count.shape[1] not in (source.heads, heads):
            block_map = block_map.per_head(heads)
        mask_heads = block_map.count.shape[1]
        keys, values = (_in_blocks(side, block_map.block_k) for side in (source.keys(), source.values()))
        per_head = keys.shape[0] // (batch * source.heads)
        whole, partial = block_map.whole, block_map.count - block_map.whole
        lists = block_map.lists(fill=0)
        group, size = heads // mask_heads, block_map.block_k
        first = torch.arange(mask_heads) // (mask_heads // source.heads)
        begin = (torch.arange(batch)[:, None] * source.heads + first)[..., None] * per_head
        output = torch.empty(batch, count, heads, source.values(0, 0).shape[3], dtype=query.dtype).transpose(1, 2)
        lse = torch.empty(batch, heads, count)

        def part(index: int, own: slice) -> None:
            """Query block ``index`` of the mask heads ``own``."""
            low, high = index * block_map.block_q, min((index + 1) * block_map.block_q, count)
            columns, bias, blind = _row(
                block_map, lists[:, own, index], whole[:, own, index], partial[:, own, index], low, high
            )
            where = slice(own.start * group, own.stop * group)
            if columns.shape[2] == 0:
                output[:, where, low:high], lse[:, where, low:high] = 0.0, -torch.inf
                return
            place = (columns + begin[:, own]).flatten()
            k, v = (
                side.index_select(0, place).view(batch, -1, columns.shape[2] * block_map.block_k, side.shape[1] // size)
                for side in (keys, values)
            )
            # Heads that share a list are rows of one product.
            q = query[:, where, low:high].reshape(batch, k.shape[1], -1, channels)
            if group > 1:
                bias = bias[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
            found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=bias.to(q.dtype), scale=scaling
            )
            found, sums = found.reshape(batch, -1, high - low, v.shape[3]), sums.reshape(batch, -1, high - low)
            if blind is not None and bool(blind.any()):
                blind = blind.expand(batch, k.shape[1], -1).repeat_interleave(group, 1)
                found, sums = found.masked_fill(blind[..., None], 0.0), sums.masked_fill(blind, -torch.inf)
            output[:, where, low:high], lse[:, where, low:high] = found, sums

        alike = block_map.reach.mask is None or block_map.reach.mask.shape[1] == 1

        def row(index: int) -> None:
            counts = block_map.count[:, :, index]
            # Short lists beside long ones would be filled up to their length.
            if alike and int(counts.max()) * counts.numel() > 1.2 * int(counts.sum()):
                for head in range(mask_heads):
                    part(index, slice(head, head + 1))
            else:
                part(index, slice(0, mask_heads))

        _each(row, block_map.rows)
        return output, lse


def _in_blocks(side: Tensor, size: int) -> Tensor:
    """``side [B, Hkv, L, D]`` as blocks in a row, ``[B * Hkv * N, size * D]``, which are gathered as a whole each."""
    missing = -side.shape[2] % size
    whole = torch.nn.functional.pad(side, (0, 0, 0, missing)) if missing else side.contiguous()
    return whole.view(-1, size * side.shape[3])


def _row(
    block_map: BlockMap, own: Tensor, whole: Tensor, partial: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Blocks ``[B, M, n]`` of the lists ``own`` that queries ``[low, high)`` read, those that need a mask last, what is
    added to their scores (float32 ``[B or 1, M or 1, queries, n * block_k]``), and which queries see nothing (None:
    each sees something)."""
    size, first, last = block_map.block_k, int(whole.max()), int(partial.max())
    place = torch.arange(first)
    real = place < whole[..., None]
    # What fills a short list is a block that is read anyway, so that nobody else's numbers are touched.
    begin = own[:, :, :1]
    full = torch.where(real, own[:, :, :first], begin).long()
    after = torch.arange(last) + whole[..., None]
    some = torch.arange(last) < partial[..., None]
    edge = torch.where(some, own.gather(2, after.clamp(max=own.shape[2] - 1).long()), begin).long()
    alike = block_map.reach.batch == 1 and bool((edge == edge[:1, :1]).all()) and bool(some.all())
    ask = edge[:1, :1] if alike else edge
    tokens = (ask[..., None] * size + torch.arange(size)).flatten(2)
    tokens = torch.where(tokens < block_map.reach.keys, tokens, -1)
    if not alike:
        tokens = tokens.masked_fill(~some.repeat_interleave(size, 2), -1)
    seen = block_map.reach.between(low, high, tokens)
    bias = torch.zeros(*seen.shape[:3], (first + last) * size)
    bias[..., first * size :].masked_fill_(~seen, -torch.inf)
    if not bool(real.all()):
        bias = bias.expand(*whole.shape, -1, -1).clone() if alike else bias
        bias[..., : first * size].masked_fill_(~real.repeat_interleave(size, 2)[:, :, None], -torch.inf)
    blind = None if first and bool((whole > 0).all()) else ~seen.any(-1) & (whole == 0)[..., None]
    return torch.cat([full, edge], 2), bias, blind


def _each(function: Callable[[int], None], rows: int) -> None:
    """``function(row)`` of each row, longest first, by as many threads as torch has."""
    threads = torch.get_num_threads()
    if threads == 1 or rows == 1:
        for row in range(rows):
            function(row)
        return
    inference = torch.is_inference_mode_enabled()

    def alone(row: int) -> None:
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)  # of this thread
        with torch.inference_mode(inference):
            function(row)

    list(_pool(threads).map(alone, reversed(range(rows))))
    torch.set_num_threads(threads)  # for threads that others start later


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "rarefy-attention")
