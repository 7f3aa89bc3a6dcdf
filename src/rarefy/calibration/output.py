"""The finished folder: config with its manifest, everything that travels along, and the model card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from rarefy.core.files import write_text
from rarefy.core.memory import human
from rarefy.layers.manifest import Manifest

# What a model needs besides weights and config.json. Code is never copied.
COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "spiece*", "chat_template*", "additional_chat_templates", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "feature_extractor*", "modules.json",
    "config_sentence_transformers.json", "sentence_*config.json", "1_Pooling",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip

NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a licence, or of a model on the hub


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation and preprocessor configs and licence files."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.suffix in (".py", ".bin", ".pt", ".safetensors"):
                continue
            if path.is_dir():
                shutil.copytree(
                    path, out / path.name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "*.bin")
                )
            else:
                shutil.copyfile(path, out / path.name)


def write_config(out: Path, config: dict[str, Any], manifest: Manifest) -> None:
    """``config.json`` with the manifest as its quantization_config."""
    whole = {**config, "quantization_config": manifest.model_dump(mode="json")}
    # With this key Transformers would find the weights without rarefy, and fill what it does not know at random.
    whole.pop("transformers_weights", None)
    write_text(out / "config.json", json.dumps(whole, indent=2) + "\n")


def write_card(out: Path, base: str, architecture: str, manifest: Manifest, source: Path | None) -> None:
    """README.md: the model card with what compression achieved and how to load the model, a ``architecture``.

    ``base``: the dense model's hub id, or its name where it has none; licence and base model are then those that the
    card of the folder ``source`` tells.
    """
    licence, ancestor = _travelling(source)
    ancestor = base if "/" in base and not Path(base).is_absolute() else ancestor
    head = ["---", "library_name: transformers", "tags: [rarefy, compressed]"]
    head += [f"license: {licence}"] if licence else []
    head += [f"base_model: {ancestor}", "---"] if ancestor else ["---"]
    body = [
        f"# {Path(base).name}, compressed with rarefy",
        "",
        *_achieved(manifest),
        *(f"Attention: recipe `{entry.recipe}`.\n" for entry in (manifest.attention,) if entry is not None),
        *(f"KV cache: recipe `{entry.recipe}`.\n" for entry in (manifest.kv,) if entry is not None),
        "```python",
        "import rarefy",
        f"from transformers import {architecture}",
        "",
        f'model = {architecture}.from_pretrained("this folder")',
        "```",
        "",
        *(f"- {note}" for note in (manifest.report.notes if manifest.report else ())),
    ]
    write_text(out / "README.md", "\n".join([*head, "", *body]).rstrip() + "\n")


def _achieved(manifest: Manifest) -> list[str]:
    """What compression of the weights achieved."""
    report = manifest.report
    if report is None:
        return ["The weights are dense.", ""]
    parts = {name: bits for name, bits in report.bits_per_weight.items() if bits and name != "total"}
    return [
        f"Recipe `{manifest.recipe}`. Compressed weights take **{report.bits_per_weight['total']:.3f} bits each** "
        f"({', '.join(f'{name} {bits:.3f}' for name, bits in parts.items())}); the whole model takes "
        f"{human(report.stored_bytes)} instead of {human(report.dense_bytes)}.",
        "",
    ]


def _travelling(source: Path | None) -> tuple[str | None, str | None]:
    """Licence and base model in the front matter of the source's own card, where it has them."""
    import yaml

    try:
        lines = (source / "README.md").read_text("utf-8").splitlines() if source is not None else []
        end = lines.index("---", 1) if lines and lines[0] == "---" else 0
        facts = yaml.safe_load("\n".join(lines[1:end]))
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError, RecursionError):
        return None, None
    found = [facts.get(key) if isinstance(facts, dict) else None for key in ("license", "base_model")]
    licence, base = (value if isinstance(value, str) and NAME.fullmatch(value) else None for value in found)
    return licence, base
