"""Damaged checkpoints: every one is refused, or gives exactly the logits of the whole one. Never random weights."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor

import rarefy
import tests.integrations.mixed  # noqa: F401 - registers the recipe of many terms
from rarefy.core.errors import CheckpointError, RarefyError
from rarefy.integrations.transformers.config import RarefyConfig
from rarefy.integrations.transformers.quantizer import prepare_
from rarefy.layers.checkpoint import metadata
from rarefy.layers.manifest import Manifest, read_manifest
from tests.zoo import FAMILIES, dense_folder, logits, same_bytes, tensors

pytestmark = pytest.mark.compat

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
MUTATIONS, THROUGH_TRANSFORMERS = 1000, 200
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one file with most kinds of terms."""
    place = tmp_path_factory.mktemp("whole")
    dense_folder("llama", place / "dense", **SMALL)
    rarefy.compress(place / "dense", "mixed_for_tests", out=place / "small", device="cpu")
    return place / "small"


@pytest.fixture(scope="module")
def sharded(whole: Path) -> Path:
    folder = whole.parent / "sharded"
    rarefy.save(rarefy.load(whole), folder, max_shard_size="12KB")
    return folder


@pytest.fixture(scope="module")
def expected(whole: Path) -> Tensor:
    return logits(rarefy.load(whole), "llama")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def weights(folder: Path) -> Path:
    return folder / "rarefy.safetensors"


def refused(folder: Path, match: str, error: type[Exception] = CheckpointError) -> None:
    """Plain Transformers and ``rarefy.load`` both raise."""
    with pytest.raises(error, match=match):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(RarefyError):
        rarefy.load(folder)


def manifest_in(folder: Path) -> Manifest:
    return read_manifest(json.loads((folder / "config.json").read_text())["quantization_config"])


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``quantization_config`` in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def hashed_again(folder: Path, edit: Edit) -> None:
    """Change tensors and record hashes that fit, so that only their names, shapes and values can give them away."""
    found = load_file(weights(folder))
    edit(found)
    save_file(found, weights(folder), metadata=metadata(manifest_in(folder), found))


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: Mapping[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_the_whole_one_loads(whole: Path, sharded: Path, expected: Tensor) -> None:
    assert torch.equal(logits(rarefy.load(sharded), "llama"), expected)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    in_memory = FAMILIES["llama"].build(**SMALL)
    rarefy.compress(in_memory, "mixed_for_tests")
    assert torch.equal(logits(in_memory, "llama"), expected)


# Files


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -5000])
def test_truncated(keep: int, copy: Path) -> None:
    weights(copy).write_bytes(weights(copy).read_bytes()[:keep])
    refused(copy, "rarefy.safetensors")


def test_longer_than_it_says(copy: Path) -> None:
    weights(copy).write_bytes(weights(copy).read_bytes() + b"\0")
    refused(copy, "rarefy.safetensors")


def test_absent(copy: Path, sharded: Path, tmp_path: Path) -> None:
    weights(copy).unlink()
    refused(copy, "rarefy.safetensors", Exception)
    other = Path(shutil.copytree(sharded, tmp_path / "shards"))
    sorted(other.glob("rarefy-*"))[1].unlink()
    refused(other, "rarefy-00002", Exception)


@pytest.mark.parametrize("length", [2**62, 2**63 - 1, 2**64 - 1, 100 * 2**20])
def test_header_bomb(length: int, copy: Path) -> None:
    raw = weights(copy).read_bytes()
    weights(copy).write_bytes(struct.pack("<Q", length) + raw[8:])
    refused(copy, "truncated or not a safetensors")


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b'{"a":' * 50_000, b'"' + b"x" * 1000 + b'"', b"\xff\xfe{}", b"{}x"]
)
def test_header_that_is_no_header(header: bytes, copy: Path) -> None:
    write_header(weights(copy), header, b"")
    refused(copy, "rarefy.safetensors")


def test_header_of_many_tensors(copy: Path) -> None:
    header, data = header_of(weights(copy))
    header |= {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    write_header(weights(copy), header, data)
    refused(copy, "not part of the model")


@pytest.mark.parametrize("shape", [[2**40, 2**40], [-1], [1.5], ["8"], [2**70], [True], None, [[8]], [1] * 100])
def test_made_up_shapes(shape: Any, copy: Path) -> None:
    header, data = header_of(weights(copy))
    header["model.norm.weight"]["shape"] = shape
    write_header(weights(copy), header, data)
    refused(copy, r"model\.norm\.weight")


def test_pickled_weights(copy: Path, tmp_path: Path) -> None:
    """Neither named by the manifest nor lying beside it is a pickle ever opened."""
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    torch.save({"bomb": Bomb()}, copy / "pytorch_model.bin")
    weights(copy).unlink()
    refused(copy, ".", Exception)
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        shutil.copy(copy / "pytorch_model.bin", copy / "weights.bin")
        (copy / "weights.bin").rename(copy / name)
        edit_config(copy, lambda data, name=name: data.update(weights=name))
        refused(copy, "weights")
    assert not marker.exists()


# Names, dtypes, order


def test_renamed(copy: Path) -> None:
    def rename(found: dict[str, Tensor]) -> None:
        found[f"{ATTENTION}.q_proj.terms.0.code"] = found.pop(f"{ATTENTION}.q_proj.terms.0.codes")

    hashed_again(copy, rename)
    refused(copy, r"q_proj\.terms\.0\.codes' is missing")


def test_missing(copy: Path) -> None:
    hashed_again(copy, lambda found: found.pop("model.norm.weight"))
    refused(copy, r"'model\.norm\.weight' is missing")


def test_extra(copy: Path) -> None:
    hashed_again(copy, lambda found: found.update({"model.norm.bias": torch.zeros(32)}))
    refused(copy, r"'model\.norm\.bias' is not part of the model")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"{ATTENTION}.q_proj.terms.0.codes", torch.float32), (f"{ATTENTION}.q_proj.terms.0.scale", torch.bfloat16),
        (f"{ATTENTION}.q_proj.terms.0.scale", torch.float32), (f"{MLP}.gate_proj.terms.0.lut", torch.int16),
        (f"{MLP}.gate_proj.terms.0.codes", torch.int64), (f"{ATTENTION}.q_proj.terms.1.row_ptr", torch.float32),
    ],
)  # fmt: skip
def test_retyped(name: str, dtype: torch.dtype, copy: Path) -> None:
    hashed_again(copy, lambda found: found.update({name: found[name].to(dtype)}))
    refused(copy, name.replace(".", r"\."))


def test_retyped_in_the_header_only(copy: Path) -> None:
    """The bytes stay, their meaning changes; for dense tensors only the hash knows."""
    for name, dtype in ((f"{ATTENTION}.q_proj.terms.0.scale", "BF16"), ("model.norm.weight", "I32")):
        whole_header, data = header_of(weights(copy))
        header = {**whole_header, name: {**whole_header[name], "dtype": dtype}}
        write_header(weights(copy), header, data)
        refused(copy, name.replace(".", r"\."))
        write_header(weights(copy), whole_header, data)
    assert torch.isfinite(logits(rarefy.load(copy), "llama")).all()


def test_reordered_is_the_same_model(copy: Path, expected: Tensor) -> None:
    """Another order of tensors and header entries changes nothing that anybody reads."""
    header, data = header_of(weights(copy))
    notes = header.pop("__metadata__")
    moved: dict[str, Any] = {}
    pieces, position = [], 0
    for name in sorted(header, reverse=True):
        start, stop = header[name]["data_offsets"]
        pieces.append(data[start:stop])
        moved[name] = {**header[name], "data_offsets": [position, position + stop - start]}
        position += stop - start
    write_header(weights(copy), {**moved, "__metadata__": notes}, b"".join(pieces))
    assert torch.equal(logits(rarefy.load(copy), "llama"), expected)


def test_exchanged_tensors(copy: Path) -> None:
    """Same names, shapes and dtypes, but each holds what belongs to the other."""
    header, data = header_of(weights(copy))
    one, two = "model.layers.0.input_layernorm.weight", "model.norm.weight"
    first, second = f"{ATTENTION}.k_proj.terms.0.codes", f"{ATTENTION}.k_proj.terms.0.scale"
    assert header[one]["shape"] == header[two]["shape"] and first in header and second in header
    swapped = bytearray(data)
    here, there = f"{MLP}.down_proj.terms.1.lowrank_a.values", f"{MLP}.gate_proj.terms.0.lut"
    (a, b), (c, d) = header[here]["data_offsets"], header[there]["data_offsets"]
    size = min(b - a, d - c)
    swapped[a : a + size], swapped[c : c + size] = data[c : c + size], data[a : a + size]
    write_header(weights(copy), header, bytes(swapped))
    refused(copy, "is damaged")


@pytest.mark.parametrize("kind", ["overlap", "gap", "twins"])
def test_ranges(kind: str, copy: Path) -> None:
    header, data = header_of(weights(copy))
    if kind == "overlap":
        header["model.norm.weight"]["data_offsets"] = [0, 128]
        write_header(weights(copy), header, data)
    elif kind == "gap":
        write_header(weights(copy), header, data + b"\0" * 8)
    else:
        text = json.dumps(header)
        entry = json.dumps({"model.norm.weight": header["model.norm.weight"]})[1:-1]
        write_header(weights(copy), (text[:-1] + ", " + entry + "}").encode(), data)
    refused(copy, "rarefy.safetensors")


def test_damaged_bytes_of_every_tensor(whole: Path, tmp_path: Path) -> None:
    header, data = header_of(weights(whole))
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        changed = bytearray(data)
        changed[entry["data_offsets"][0]] ^= 1
        write_header(weights(folder), header, bytes(changed))
        with pytest.raises(CheckpointError, match="is damaged"):
            check(folder)


def test_hashes_cannot_be_left_out(copy: Path) -> None:
    header, data = header_of(weights(copy))
    notes = json.loads(header["__metadata__"]["rarefy"])
    for change in ("no metadata", "no hash", "nonsense"):
        other = {**header, "__metadata__": {"format": "pt"}}
        if change == "no hash":
            hashes = {name: value for name, value in notes["tensors"].items() if "q_proj" not in name}
            other["__metadata__"] = {"format": "pt", "rarefy": json.dumps({**notes, "tensors": hashes})}
        if change == "nonsense":
            other["__metadata__"] = {"format": "pt", "rarefy": "[1, 2]"}
        write_header(weights(copy), other, data)
        refused(copy, "metadata|no hash")


def test_plain_saves_are_guarded_too(whole: Path, tmp_path: Path) -> None:
    """What ``save_pretrained`` writes carries the hashes of dense tensors as well."""
    model = rarefy.load(whole)
    for name in ("model.norm.weight", f"{ATTENTION}.q_proj.terms.0.codes"):
        model.save_pretrained(tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        header, data = header_of(path)
        changed = bytearray(data)
        changed[header[name]["data_offsets"][0]] ^= 1
        write_header(path, header, bytes(changed))
        refused(tmp_path / name, "is damaged")
    model.save_pretrained(tmp_path / "shards", max_shard_size="12KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    assert torch.equal(logits(rarefy.load(tmp_path / "shards"), "llama"), logits(model, "llama"))
    places = json.loads(index.read_text())
    outside = Path(shutil.copytree(tmp_path / "shards", tmp_path / "outside"))
    places["weight_map"] = {name: f"../{outside.name}/{file}" for name, file in places["weight_map"].items()}
    index.write_text(json.dumps(places))
    refused(tmp_path / "shards", "outside|not a file beside it")


# Values that hashes cannot tell


def _set(name: str, value: float, position: int = 0) -> Edit:
    def edit(found: dict[str, Tensor]) -> None:
        found[name].view(-1)[position] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set(f"{ATTENTION}.q_proj.terms.0.scale", float("nan")), "'scale' holds NaN"),
        (_set(f"{ATTENTION}.q_proj.terms.0.scale", float("inf"), 7), "'scale' holds NaN or infinity"),
        (_set(f"{MLP}.gate_proj.terms.0.lut", float("-inf")), "'lut' holds NaN"),
        (_set(f"{ATTENTION}.v_proj.terms.0.values", float("nan"), 5), "'values' holds NaN"),
        (_set(f"{MLP}.down_proj.terms.0.parts.1.second_order", float("nan")), "'second_order' holds NaN"),
        (_set(f"{MLP}.down_proj.terms.1.lowrank_a.values", float("nan")), "'values' holds NaN"),
        (_set(f"{ATTENTION}.q_proj.terms.1.entries", 0x7E00 << 16), "'entries' hold NaN"),
        (_set(f"{ATTENTION}.q_proj.terms.1.entries", 0x3C00 << 16 | 32), "column beyond 32"),
        (_set(f"{ATTENTION}.q_proj.terms.1.row_ptr", 1), "row_ptr"),
        (_set(f"{ATTENTION}.q_proj.terms.1.row_ptr", 2**31 - 1, 3), "row_ptr"),
        (_set(f"{ATTENTION}.q_proj.terms.1.row_ptr", -1, 3), "row_ptr"),
        (_set(f"{ATTENTION}.k_proj.terms.0.codes", 243), "codes"),
        (_set(f"{ATTENTION}.v_proj.terms.0.indices", -1), "indices"),
        (_set(f"{ATTENTION}.o_proj.terms.0.bitmap", -1), "kept weights"),
        (_set(f"{MLP}.up_proj.terms.0.codes", -1), "codes"),
        (_set(f"{MLP}.down_proj.terms.0.parts.0.row_ptr", 2**30, 2), "row_ptr"),
        (_set(f"{MLP}.down_proj.terms.0.parts.0.indices", 200), "indices"),
        (_set(f"{MLP}.down_proj.terms.0.parts.1.permutation", 24), "permutation"),
        (_set(f"{MLP}.down_proj.terms.0.parts.1.permutation", 1), "permutation"),
    ],
)
def test_values_that_could_mislead_a_kernel(edit: Edit, message: str, copy: Path) -> None:
    hashed_again(copy, edit)
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(copy)


# The manifest


@pytest.mark.parametrize("version", [0, 2, 99, -1, "1", 1.0, True, None, [1]])
def test_versions(version: Any, copy: Path) -> None:
    edit_config(copy, lambda data: data.update(format_version=version))
    refused(copy, "format version")


def test_unknown_keys(copy: Path) -> None:
    for change in (
        lambda data: data.update(surprise=1),
        lambda data: data["rules"][0].update(surprise=1),
        lambda data: data["rules"][0]["terms"][0].update(surprise=1),
        lambda data: data["rules"][0]["terms"][0].update(type="surprise"),
        lambda data: data["rules"][0]["terms"][0].pop("type"),
        lambda data: data.pop("rules"),
        lambda data: data.update(rules="none"),
        lambda data: data["rules"][0].update(terms=[]),
        lambda data: data["rules"][0].update(modules=[]),
        lambda data: data.pop("recipe"),
        lambda data: data.update(quant_method="rarefy ", rules=[]),
    ):
        before = (copy / "config.json").read_text()
        edit_config(copy, change)
        refused(copy, ".", Exception)
        (copy / "config.json").write_text(before)


def test_other_terms_than_stored(copy: Path) -> None:
    for change in (
        lambda data: grid_of(data, "integer").update(group_size=16),
        lambda data: grid_of(data, "integer").update(num_bits=3),
        lambda data: grid_of(data, "binary").update(regions=2),
        lambda data: grid_of(data, "level").update(levels=5),
        lambda data: data["rules"][0]["modules"].pop(),
        lambda data: data["rules"][0]["modules"].append("model.norm"),
        lambda data: data["rules"][0]["modules"].append("model.layers.7.mlp.up_proj"),
        lambda data: data["rules"][0]["modules"].append(""),
        lambda data: data["rules"][0]["modules"].append(data["rules"][1]["modules"][0]),
        lambda data: data["rules"][0]["modules"].append(data["rules"][0]["modules"][0]),
        lambda data: data.update(rules=[]),
        lambda data: data["rules"].pop(),
    ):
        before = (copy / "config.json").read_text()
        edit_config(copy, change)
        refused(copy, ".")
        (copy / "config.json").write_text(before)


def grid_of(data: dict[str, Any], kind: str) -> dict[str, Any]:
    grids = [term["grid"] for rule in data["rules"] for term in rule["terms"] if "grid" in term]
    return next(grid for grid in grids if grid["type"] == kind)


def test_equal_shapes_with_another_meaning(copy: Path) -> None:
    """Nothing but the recorded hash of the manifest can tell these apart."""
    edit_config(copy, lambda data: grid_of(data, "float").update(format="fp4"))
    refused(copy, "does not belong to this config.json")


@pytest.mark.parametrize(("depth", "error"), [(40, CheckpointError), (5000, Exception)])
def test_nested_beyond_reason(depth: int, error: type[Exception], copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["rules"][0]["terms"][0] = "DEEP"
    deep = '{"type": "product", "rank": 1, "right": {"type": "dense"}, "left": ' * depth + "1" + "}" * depth
    (copy / "config.json").write_text(json.dumps(config).replace('"DEEP"', deep))
    refused(copy, "nested deeper|recursion", error)


@pytest.mark.parametrize(
    "name",
    ["../copy/rarefy.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "rarefy", "x.pt", "..\\a.safetensors"],
)
def test_weights_outside_the_folder(name: str, copy: Path) -> None:
    edit_config(copy, lambda data: data.update(weights=name))
    refused(copy, "weights")


@pytest.mark.parametrize("target", ["../{other}/{file}", "{absolute}/{file}", "./{file}", "x/../{file}"])
@pytest.mark.parametrize("every", [True, False])
def test_traversal_in_the_index(target: str, every: bool, sharded: Path, tmp_path: Path) -> None:
    """Also when all shards, whole and well hashed, lie in the other folder."""
    folder = Path(shutil.copytree(sharded, tmp_path / "shards"))
    other = Path(shutil.copytree(sharded, tmp_path / "other"))
    (folder / "x").mkdir()
    index = folder / "rarefy.safetensors.index.json"
    places = json.loads(index.read_text())
    for name, file in list(places["weight_map"].items()):
        if every or file.startswith("rarefy-00001"):
            places["weight_map"][name] = target.format(other=other.name, absolute=other, file=file)
    index.write_text(json.dumps(places))
    if every:
        for path in folder.glob("rarefy-*.safetensors"):
            path.unlink()
    refused(folder, ".", Exception)
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_index_that_is_none(text: str, sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "shards"))
    (folder / "rarefy.safetensors.index.json").write_text(text)
    refused(folder, ".", Exception)


def test_shards_of_two_models(whole: Path, sharded: Path, tmp_path: Path) -> None:
    """Every file is whole, but one belongs to a model that was compressed otherwise."""
    other = tmp_path / "int8"
    rarefy.compress(
        whole.parent / "dense", "rtn", options={"num_bits": 8}, out=other, max_shard_size="12KB", device="cpu"
    )
    folder = Path(shutil.copytree(sharded, tmp_path / "mixed"))
    index = json.loads((folder / "rarefy.safetensors.index.json").read_text())
    target = next(file for name, file in index["weight_map"].items() if name == "model.norm.weight")
    source = json.loads((other / "rarefy.safetensors.index.json").read_text())["weight_map"]["model.norm.weight"]
    shutil.copy(other / source, folder / target)
    refused(folder, ".")


def test_a_tensor_in_two_shards(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "shards"))
    first, second = sorted(folder.glob("rarefy-*.safetensors"))[:2]
    mine = {**load_file(second), "model.embed_tokens.weight": torch.zeros(96, 32)}
    save_file(mine, second, metadata=metadata(manifest_in(folder), mine))
    held = {name for path in (first, second) for name in load_file(path)}
    assert "model.embed_tokens.weight" in held
    refused(folder, "is in '")


# Two thousand random mutations


def check(folder: Path) -> None:
    """What is checked before a tensor is read, without the rest of Transformers' loading."""
    config = json.loads((folder / "config.json").read_text())
    quantization = RarefyConfig(**config["quantization_config"])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**FAMILIES["llama"].values | SMALL))
    files = [folder / quantization.manifest.weights]
    prepare_(model, quantization.manifest, files)


def mutate(raw: bytes, low: int, high: int, dice: random.Random) -> tuple[bytes, str]:
    """``raw`` with one random change between ``low`` and ``high``, and what kind it is."""
    at = dice.randrange(low, high)
    kind = dice.choice(
        ["flip", "flip", "flip", "overwrite", "overwrite", "truncate", "insert", "delete", "swap", "repeat"]
    )
    length = min(dice.choice([1, 1, 2, 4, 8, 64]), high - at)
    if kind == "flip":
        return raw[:at] + bytes([raw[at] ^ (1 << dice.randrange(8))]) + raw[at + 1 :], kind
    if kind == "overwrite":
        return raw[:at] + dice.randbytes(length) + raw[at + length :], kind
    if kind == "truncate":
        return raw[:at], kind
    if kind == "insert":
        return raw[:at] + dice.randbytes(length) + raw[at:], kind
    if kind == "delete":
        return raw[:at] + raw[at + length :], kind
    other = dice.randrange(low, high)
    first, second = sorted((at, other))
    length = min(length, second - first, high - second)
    one, two = raw[first : first + length], raw[second : second + length]
    if kind == "repeat":
        return raw[:second] + one + raw[second + length :], kind
    return raw[:first] + two + raw[first + length : second] + one + raw[second + length :], kind


def same_content(raw: bytes, original: dict[str, Tensor]) -> bool:
    """Whether mutated weights still hold exactly the original tensors under their names."""
    try:
        return same_bytes(load(raw), original)
    except (SafetensorError, KeyError, ValueError, UnicodeDecodeError, OverflowError):
        return False


def same_meaning(raw: bytes, original: dict[str, Any]) -> bool:
    """Whether a mutated config still says the same about how weights are stored."""
    try:
        data = json.loads(raw.decode())["quantization_config"]
        return all(data[key] == original[key] for key in ("quant_method", "format_version", "weights")) and [
            [rule["modules"], rule["terms"]] for rule in data["rules"]
        ] == [[rule["modules"], rule["terms"]] for rule in original["rules"]]
    except (ValueError, KeyError, TypeError):
        return False


def test_random_mutations(whole: Path, expected: Tensor, tmp_path: Path) -> None:
    """Each is refused, or loads as if nothing had happened; those that change what is stored are all refused."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    weight_bytes, config_bytes = weights(whole).read_bytes(), (whole / "config.json").read_bytes()
    original, config = tensors(whole), json.loads(config_bytes)["quantization_config"]
    start = config_bytes.index(b'"quantization_config"')
    end = len(config_bytes) - 2  # it is the last key of config.json, before the closing brace and a newline
    data_start = 8 + int.from_bytes(weight_bytes[:8], "little")
    dice = random.Random(transformers.__version__)  # others with every Transformers that is tested
    counts = {"refused": 0, "loaded": 0, "changed": 0}
    for number in range(MUTATIONS):
        place = ("data", "header", "config", "data")[number % 4]
        if place == "config":
            raw, kind = mutate(config_bytes, start, end, dice)
            (folder / "config.json").write_bytes(raw)
            unchanged = same_meaning(raw, config)
        else:
            low, high = (data_start, len(weight_bytes)) if place == "data" else (0, data_start)
            raw, kind = mutate(weight_bytes, low, high, dice)
            weights(folder).write_bytes(raw)
            unchanged = same_content(raw, original)
        counts["changed"] += not unchanged
        about = f"mutation {number}: {kind} in {place}"
        # A model comes out of the short way only if nothing that matters changed; then the long way must agree.
        try:
            if number % (MUTATIONS // THROUGH_TRANSFORMERS):
                check(folder)
            result = logits(transformers.AutoModelForCausalLM.from_pretrained(folder), "llama")
        except Exception as failure:
            counts["refused"] += 1
            if place != "config":
                assert isinstance(failure, CheckpointError), about
        else:
            counts["loaded"] += 1
            assert torch.equal(result, expected), about
            assert unchanged, about
        if place == "config":
            (folder / "config.json").write_bytes(config_bytes)
        else:
            weights(folder).write_bytes(weight_bytes)
    assert counts["refused"] + counts["loaded"] == MUTATIONS
    assert counts["changed"] <= counts["refused"]
    assert counts["changed"] > 700, counts
    assert torch.equal(logits(rarefy.load(folder), "llama"), expected)


def test_safetensors_and_our_reader_agree(whole: Path) -> None:
    """What we check is what the library reads."""
    from rarefy.core.files import read_header

    header = read_header(weights(whole))
    with safe_open(weights(whole), framework="pt") as opened:
        assert set(opened.keys()) == set(header.tensors)
        for name in opened.keys():  # noqa: SIM118 - not a dict
            assert tuple(opened.get_slice(name).get_shape()) == header.tensors[name].shape
