"""Long contexts on models as people name them: texts and files of sessions found, then asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.core.config import parse
from rarefy.core.devices import Device
from rarefy.core.errors import OptionError
from rarefy.evaluation.forward import CacheFactory
from rarefy.evaluation.long import runner
from rarefy.evaluation.long.results import LongComparison
from rarefy.evaluation.long.sessions import read_sessions
from rarefy.evaluation.long.suite import LongProtocol
from rarefy.evaluation.protocol import bos_token
from rarefy.integrations.transformers.kv_evaluation import with_caches
from rarefy.integrations.transformers.plan_evaluation import with_plans
from rarefy.integrations.transformers.subjects import open_subjects
from rarefy.sources.texts import open_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate_long(
    models: Sequence[str | Path | PreTrainedModel],
    reference: str | Path | PreTrainedModel | None,
    data: str | Path,
    protocol: Mapping[str, Any],
    *,
    session_files: Sequence[str | Path] = (),
    cache: CacheFactory | None = None,
    kv: Sequence[str] = (),
    attention: Sequence[str] = (),
    work_dir: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: Device = "auto",
    tokenizer: Any = None,
) -> LongComparison:
    """As ``rarefy.evaluate_long``; ``protocol`` has the options of ``LongProtocol``."""
    if kv and cache is not None:
        raise OptionError("Give cache= or kv=, not both.")
    if (kv or attention) and reference is None and len(models) == 1:
        reference = models[0]
    text = open_text(data, "evaluation")
    wanted = parse(LongProtocol, {**protocol, "text": text.name}, "Long evaluation", OptionError)
    asked = [session for file in session_files for session in read_sessions(Path(file))]
    subjects = open_subjects(models, reference, dtype=dtype, device=device, tokenizer=tokenizer, cache=cache)
    candidates = with_caches(with_plans(subjects.candidates, attention, reads_cache=True), kv, subjects.tokenizer)
    return runner.evaluate_long(
        candidates, subjects.tokenizer, text.text, wanted, reference=subjects.reference, sessions=asked,
        begin=bos_token(subjects.tokenizer, None), work_dir=None if work_dir is None else Path(work_dir),
        free_bytes=subjects.free_bytes,
    )  # fmt: skip
