"""One pass over logits that yields every metric, a few rows at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rarefy.evaluation.divergence import kl_, top1
from rarefy.evaluation.perplexity import token_nll

# One float32 buffer. On a CPU rows should stay in the cache between the passes over them; a GPU wants more at once.
CPU_BUFFER_BYTES = 4 << 20
GPU_BUFFER_BYTES = 64 << 20


class Scores(NamedTuple):
    """Per predicted token: ``nll`` and ``kl`` in nats (float32 [T]), ``agree`` (bool [T]); None without a reference."""

    nll: torch.Tensor
    kl: torch.Tensor | None
    agree: torch.Tensor | None


class Scorer:
    """Scores rows of logits against targets and, if given, a reference's logits.

    ``rows`` rows are worked on at once (None: as many as suit the device). Working memory is at most four float32
    buffers [rows, V] and is kept: fresh memory for every chunk costs more than the arithmetic.
    """

    def __init__(self, rows: int | None = None):
        self._rows = rows
        self._buffers: dict[tuple[torch.device, int], list[torch.Tensor]] = {}

    @torch.inference_mode()
    def score(self, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None) -> Scores:
        """``logits`` and ``reference`` [T, V] of any float dtype, ``targets`` LongTensor [T]."""
        if reference is not None:
            reference = reference.to(logits.device)
        targets = targets.to(logits.device)
        buffers = self._workspace(logits.device, logits.shape[1])
        rows = buffers[0].shape[0]
        nll, kl, agree = [], [], []
        for start in range(0, logits.shape[0], rows):
            part = slice(start, start + rows)
            raw, log_probs = _log_softmax(logits[part], buffers[0], buffers[1])
            nll.append(token_nll(log_probs, targets[part]))
            if reference is not None:
                reference_raw, reference_log_probs = _log_softmax(reference[part], buffers[2], buffers[3])
                agree.append(top1(reference_raw, raw))
                kl.append(kl_(reference_log_probs, log_probs))
        if reference is None:
            return Scores(torch.cat(nll), None, None)
        return Scores(torch.cat(nll), torch.cat(kl), torch.cat(agree))

    def _workspace(self, device: torch.device, vocab: int) -> list[torch.Tensor]:
        key = (device, vocab)
        if key not in self._buffers:
            budget = CPU_BUFFER_BYTES if device.type == "cpu" else GPU_BUFFER_BYTES
            rows = self._rows or max(1, budget // (4 * vocab))
            self._buffers[key] = [torch.empty(rows, vocab, dtype=torch.float32, device=device) for _ in range(4)]
        return self._buffers[key]


def _log_softmax(logits: torch.Tensor, copy: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``logits`` as float32 (themselves or in ``copy``) and their log-softmax in ``out``."""
    count = logits.shape[0]
    raw = logits if logits.dtype == torch.float32 else copy[:count].copy_(logits)
    return raw, torch.log_softmax(raw, -1, out=out[:count])
