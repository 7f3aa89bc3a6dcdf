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
from rarefy.integrations.transformers.variants import open_variants
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
    text = open_text(data, "evaluation")
    wanted = parse(LongProtocol, {**protocol, "text": text.name}, "Long evaluation", OptionError)
    asked = [session for file in session_files for session in read_sessions(Path(file))]
    subjects = open_variants(
        models, reference, attention=attention, kv=kv, cache=cache, dtype=dtype, device=device, tokenizer=tokenizer
    )
    return runner.evaluate_long(
        subjects.candidates, subjects.tokenizer, text.text, wanted, reference=subjects.reference, sessions=asked,
        begin=bos_token(subjects.tokenizer, None), work_dir=None if work_dir is None else Path(work_dir),
        free_bytes=subjects.free_bytes,
    )  # fmt: skip
