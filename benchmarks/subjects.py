"""What the accuracy benchmarks measure on: models by name and seed, windows of texts, calibration samples."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rarefy.calibration.samples import Samples, sample_windows
from rarefy.core.errors import OptionError
from rarefy.evaluation.protocol import Protocol, bos_token
from rarefy.sources.cache import MARKER, cached_folder
from rarefy.sources.demo import GGUF_SHA256, MODEL, NEEDED_BYTES
from rarefy.sources.jitter import QKV, jitter
from rarefy.sources.models import open_model
from rarefy.sources.shards import write_shards
from rarefy.sources.texts import open_text
from rarefy.sources.windows import begin_token, tokenize, windows

JITTER = 0.10
ABOUT = {
    "demo": f"{MODEL} (demo, jitter {JITTER:.2f})",
    "folded": f"{MODEL} (demo, norm gains folded into the layers that read them, jitter {JITTER:.2f})",
}
# Sequences of this many tokens tell whether two texts hold the same passage; the share of the evaluation text's that
# the calibration text may hold: stock phrases, no passage.
PASSAGE, LEAK = 13, 1e-3


def about(model: str) -> str:
    """A model in words, for tables."""
    return ABOUT.get(model, Path(model).name)


def open_subject(model: str, seed: int) -> tuple[Path, int]:
    """Folder of the dense model and bits per weight in it. ``demo`` and ``folded`` draw their jitter from ``seed``; a
    folder is the same for every seed."""
    if model == "folded":
        folder = _folded(seed)
    else:
        folder = open_model(f"demo:jitter={JITTER},seed={seed}" if model == "demo" else model).folder
    config = json.loads((folder / "config.json").read_text("utf-8"))
    dtype: torch.dtype = getattr(torch, config.get("dtype") or "float32")
    return folder, 8 * dtype.itemsize


def evaluation_windows(texts: Sequence[str], tokenizer: Any, protocol: Protocol) -> tuple[torch.Tensor, Protocol]:
    """Windows ``[count, context]``, the first ``protocol.windows`` of each text, and the protocol that says so."""
    bos = bos_token(tokenizer, None)
    opened = [open_text(text, "evaluation") for text in texts]
    cut = [windows(tokenize(tokenizer, text.text), protocol.context, protocol.windows, bos) for text in opened]
    more = f" and {len(opened) - 1} more" if len(opened) > 1 else ""
    whole = torch.cat(cut)
    stated = {"text": opened[0].name + more, "form": opened[0].form, "bos": bos is not None, "windows": len(whole)}
    return whole, protocol.model_copy(update=stated)


def calibration_samples(text: str, tokenizer: Any, samples: int, seq_len: int, seed: int) -> Samples:
    """``samples`` sequences of ``seq_len`` tokens of a text, drawn by ``seed``."""
    opened = open_text(text, "calibration")
    name = "C4 and Wikipedia sample" if text == "demo" else opened.name
    tokens = tokenize(tokenizer, opened.text)
    drawn = sample_windows(tokens, samples, seq_len, begin_token(tokenizer), seed, name)
    for note in drawn.notes:
        print(f"note: {note}", file=sys.stderr)
    return drawn


def refuse_leak(measured: torch.Tensor, samples: Samples) -> None:
    """Raise OptionError when passages of the evaluation windows are among the calibration samples."""
    seen = torch.cat([_passages(batch["input_ids"]) for batch in samples.batches])
    share = float(torch.isin(_passages(measured), seen).double().mean())
    if share > LEAK:
        raise OptionError(
            f"{share:.1%} of the evaluation text's sequences of {PASSAGE} tokens are in the calibration data; "
            "calibrate on another text."
        )


def _passages(tokens: torch.Tensor) -> torch.Tensor:
    """A hash of every ``PASSAGE`` consecutive tokens of each row."""
    width = tokens.shape[1] - PASSAGE + 1
    mixed = torch.zeros(tokens.shape[0], max(0, width), dtype=torch.long)
    for offset in range(PASSAGE if width > 0 else 0):
        mixed = mixed * 1_000_003 + tokens[:, offset : offset + width] + 1  # wraps, as a hash may
    return mixed.flatten()


def _folded(seed: int) -> Path:
    """The demo with the gains of its block norms moved into the layers that read them, then jittered.

    The function stays the same, but a gain is small where activations are large, so folding shrinks just the weight
    columns that matter most: rounding loses far more than the weight error shows.
    """
    identity: dict[str, str | int | float] = {"kind": "folded", "sha256": GGUF_SHA256, "jitter": JITTER, "seed": seed}
    return cached_folder(f"{MODEL}-folded", identity, NEEDED_BYTES, lambda stage: _build(stage, seed))


def _build(stage: Path, seed: int) -> None:
    from safetensors.torch import load_file

    source = open_model("demo:jitter=0").folder
    state: dict[str, torch.Tensor] = {}
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            state.update(load_file(path))
        elif path.name != MARKER and not path.name.endswith(".index.json"):
            shutil.copy(path, stage)
    config = json.loads((source / "config.json").read_text("utf-8"))
    layers, heads, kv_heads = (
        config[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads")
    )
    state = jitter(
        fold_gains(state, layers), layers=layers, heads=heads, kv_heads=kv_heads, sigma=JITTER, seed=seed
    )
    write_shards(stage, {name: tensor.nbytes for name, tensor in state.items()}, state.__getitem__)


def fold_gains(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A copy of a Llama's ``state`` whose block norms have gain 1; the next layers' columns are scaled instead."""
    out = dict(state)
    readers = {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
    for layer in range(layers):
        for norm, modules in readers.items():
            name = f"model.layers.{layer}.{norm}.weight"
            gain, out[name] = out[name], torch.ones_like(out[name])
            for module in modules:
                weight = f"model.layers.{layer}.{module}.weight"
                out[weight] = out[weight] * gain
    return out
