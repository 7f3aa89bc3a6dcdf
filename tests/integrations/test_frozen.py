"""Checkpoints made by earlier versions keep loading, to the bit: one folder under tests/data for each format version.

A folder is made once, before its version is released, with the oldest supported Transformers, and never again:
``python -m tests.integrations.test_frozen tests/data/frozen_vN``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import rarefy
from rarefy.layers.manifest import FORMAT_VERSION
from rarefy.layers.swap import compressed
from tests.zoo import dense_folder, same_bytes, tensors

DATA = Path(__file__).parents[1] / "data"
FROZEN = sorted(DATA.glob("frozen_v*"))

pytestmark = pytest.mark.compat


def weight_hashes(model: Any) -> dict[str, str]:
    return {
        name: hashlib.sha256(layer.decode().contiguous().numpy().tobytes()).hexdigest()
        for name, layer in compressed(model)
    }


@pytest.mark.parametrize("folder", FROZEN, ids=[folder.name for folder in FROZEN])
def test_an_older_checkpoint_loads_to_the_bit(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with safe_open(folder / "expected.safetensors", framework="pt") as expected:
        assert weight_hashes(model) == json.loads(expected.metadata()["weights"])
        with torch.no_grad():
            logits = model(expected.get_tensor("tokens")).logits
        # Another machine adds in another order; the weights above are the same to the bit.
        assert torch.allclose(logits, expected.get_tensor("logits"), atol=1e-5, rtol=1e-4)
    rarefy.save(model, tmp_path / "again")
    stored = tensors(tmp_path / "again")
    with safe_open(folder / "rarefy.safetensors", framework="pt") as opened:
        assert same_bytes(stored, {name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    assert torch.equal(
        rarefy.load(tmp_path / "again")(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits
    )


def test_every_format_version_has_one() -> None:
    assert {int(folder.name.removeprefix("frozen_v")) for folder in FROZEN} == set(range(1, FORMAT_VERSION + 1))


def make(folder: Path) -> None:
    """A Llama of two layers: the first with a term of each kind, the second with 4-bit integers."""
    import shutil
    import tempfile

    import tests.integrations.mixed  # noqa: F401 - registers its recipe
    from rarefy.contracts import Recipe, Rule

    rules = (
        Rule(method="mixed_for_tests", targets=("re:model\\.layers\\.0\\.",)),
        Rule(method="rtn", options={"num_bits": 4, "group_size": 16}),
    )
    with tempfile.TemporaryDirectory() as place:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
        dense_folder("llama_tied", Path(place) / "dense", **sizes)
        rarefy.compress(
            Path(place) / "dense", Recipe(name="frozen", rules=rules), out=Path(place) / "out", device="cpu"
        )
        folder.mkdir(parents=True)
        for name in ("config.json", "rarefy.safetensors"):
            shutil.copyfile(Path(place) / "out" / name, folder / name)
    model = rarefy.load(folder)
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = {"tokens": tokens, "logits": model(tokens).logits.contiguous()}
    notes = {"format": "pt", "weights": json.dumps(weight_hashes(model))}
    save_file(found, folder / "expected.safetensors", metadata=notes)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
