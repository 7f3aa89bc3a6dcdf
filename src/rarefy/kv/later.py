"""Encoding that the step which fills a block does not wait for: a thread of its own and, on a GPU, a stream."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rarefy.kv.side import Run


@dataclass
class Pending:
    """Blocks that are being encoded: the ``count`` first tokens of a tail. ``after``: what a GPU has to finish before
    their codes are read."""

    future: Future[list[Run]]
    count: int
    after: Any = None

    def done(self) -> bool:
        return self.future.done()

    def runs(self) -> list[Run]:
        """The encoded blocks, waited for if need be; the current stream waits for theirs."""
        found = self.future.result()
        if self.after is not None:
            torch.cuda.current_stream().wait_event(self.after)
            for run in found:
                for tensor in run.payload.values():
                    # Freed by whoever reads it, which must not be before that stream has.
                    tensor.record_stream(torch.cuda.current_stream())
        return found


class Encoder:
    """Encodes blocks one after the other, off the thread and the stream that ask for it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rarefy-encode")
        self._streams: dict[torch.device, Any] = {}

    def submit(self, work: Callable[[Tensor], list[Run]], x: Tensor, count: int) -> Pending:
        """``work(x)`` for the ``count`` tokens of ``x``, which nobody changes."""
        mode = torch.is_inference_mode_enabled()
        if not x.is_cuda:
            return Pending(self._pool.submit(_quietly, work, x, mode), count)
        stream = self._streams.setdefault(x.device, torch.cuda.Stream(x.device))
        ready, after = torch.cuda.Event(), torch.cuda.Event()
        ready.record()

        def aside(tensor: Tensor) -> list[Run]:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                tensor.record_stream(stream)
                found = work(tensor)
                after.record(stream)
            return found

        return Pending(self._pool.submit(_quietly, aside, x, mode), count, after)


def _quietly(work: Callable[[Tensor], list[Run]], x: Tensor, mode: bool) -> list[Run]:
    """Modes of gradients belong to threads."""
    with torch.inference_mode(mode), torch.no_grad():
        return work(x)
