"""Weight files on disk: written shard by shard with a hash of every tensor, and checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from rarefy.core.errors import CheckpointError, FormatError, OptionError
from rarefy.core.files import Header, TensorInfo, read_header, write_tensors, write_text
from rarefy.formats.layout import DTYPE_NAMES, DTYPES, Layout, bind
from rarefy.layers.manifest import Manifest

METADATA_KEY = "rarefy"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``5GB``. Raises OptionError."""
    if isinstance(text, int):
        size = text
    else:
        digits, unit = text.strip().upper(), 1
        for name, factor in _UNITS.items():
            if digits.endswith(name):
                digits, unit = digits.removesuffix(name), factor
                break
        try:
            size = int(float(digits) * unit)
        except (ValueError, OverflowError):
            size = 0
    if size < 1:
        raise OptionError(f"'{text}' is not a size; write it like 500MB or 5GB.")
    return size


def tensor_digest(dtype: str, shape: Iterable[int], data: bytes | memoryview) -> str:
    """A short hash of a tensor's safetensors dtype name, shape and bytes."""
    digest = hashlib.sha256(f"{dtype}{list(shape)}".encode())
    digest.update(data)
    return digest.hexdigest()[:16]


def digest_of(tensor: Tensor) -> str:
    """``tensor_digest`` of a tensor in memory."""
    flat = tensor.detach().cpu().contiguous()
    dtype = DTYPE_NAMES.get(flat.dtype, str(flat.dtype))
    data = memoryview(flat.reshape(-1).view(torch.uint8).numpy() if flat.numel() else b"")  # type: ignore[arg-type]
    return tensor_digest(dtype, flat.shape, data)


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """``digest_of`` of several tensors, a thread for each processor: hashing takes longer than writing."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(tensors, threads.map(digest_of, tensors.values()), strict=True))


def metadata(manifest: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Safetensors metadata for files that hold ``tensors``: their hashes and that of the manifest."""
    hashes = digests_of(tensors)
    return {
        "format": "pt",
        METADATA_KEY: json.dumps({"manifest": manifest.digest(), "tensors": hashes}, sort_keys=True),
    }


class ShardWriter:
    """Writes tensors to ``folder/<stem>*.safetensors`` in the order they come, at most ``max_bytes`` to a file.

    Files get their final names, and an index if there are several, in ``finish``; a crash before leaves no file that
    a loader would take.
    """

    def __init__(self, folder: Path, weights_name: str, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self.stem = weights_name.removesuffix(".safetensors")
        self._pending: dict[str, Tensor] = {}
        self._shards: list[tuple[Path, list[str]]] = []
        self._filled = 0
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor (kept by reference until its shard is written)."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._filled + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.detach().contiguous().cpu()
        self._filled += size
        self.total_bytes += size

    def finish(self, manifest: Manifest) -> Manifest:
        """Write what is left, give all files their names, and return the manifest with the name to open first."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        places: dict[str, str] = {}
        for number, (part, names) in enumerate(self._shards, start=1):
            label = f"{self.stem}.safetensors" if count == 1 else f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"
            _complete_header(part, manifest.digest())
            os.replace(part, self.folder / label)
            places.update(dict.fromkeys(names, label))
        if count == 1:
            return manifest.model_copy(update={"weights": f"{self.stem}.safetensors"})
        name = f"{self.stem}.safetensors.index.json"
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(places.items()))}
        write_text(self.folder / name, json.dumps(index, indent=2) + "\n")
        return manifest.model_copy(update={"weights": name})

    def _flush(self) -> None:
        part = self.folder / f".{self.stem}-{len(self._shards) + 1:05d}.part"
        hashes = digests_of(self._pending)
        notes = {"format": "pt", METADATA_KEY: json.dumps({"manifest": "0" * 16, "tensors": hashes}, sort_keys=True)}
        write_tensors(part, self._pending, notes)
        self._shards.append((part, list(self._pending)))
        self._pending, self._filled = {}, 0


def _complete_header(path: Path, digest: str) -> None:
    """The manifest is known only when all tensors are: replace its 16 reserved digits in the file's metadata.

    The library writes metadata in an order that changes from run to run; equal jobs must end in equal bytes.
    """
    placeholder = b'\\"manifest\\": \\"' + b"0" * 16
    start, form = b'{"__metadata__":{', b'"format":"pt"'
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length)
        if header.count(placeholder) != 1 or not header.startswith(start):
            raise CheckpointError(f"'{path.name}' could not be completed; compress the model again.")
        header = header.replace(placeholder, placeholder[:-16] + digest.encode())
        if not header.startswith(start + form):  # quotes within the other entry are escaped, so this finds the key
            header = (start + form + b"," + header.removeprefix(start)).replace(b"," + form + b"}", b"}", 1)
        assert len(header) == length
        stream.seek(8)
        stream.write(header)


def read_headers(files: Iterable[Path]) -> dict[Path, Header]:
    """The headers of weight files. Raises CheckpointError when one is damaged or two files hold the same tensor."""
    headers: dict[Path, Header] = {}
    owners: dict[str, Path] = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"Weight file '{path.name}' is missing; copy the whole folder again.")
        headers[path] = read_header(path)
        for name in headers[path].tensors:
            if name in owners:
                raise CheckpointError(
                    f"Tensor '{name}' is in '{owners[name].name}' and in '{path.name}'; copy the whole folder again."
                )
            owners[name] = path
    return headers


def check_places(files: Iterable[Path], source: str) -> None:
    """Raise CheckpointError when weight files that an index named lie outside the model folder ``source``.

    A ``source`` that is no folder (a hub id) is not checked here; its index is (see ``check_index``).
    """
    if not os.path.isdir(source):
        return
    root = os.path.abspath(source)
    for path in files:
        if not os.path.abspath(path).startswith(os.path.join(root, "")):
            raise CheckpointError(f"An index names '{path.name}' outside its folder; do not trust this folder.")


def check_index(folder: Path, weights_name: str) -> None:
    """Check the index of the weights ``weights_name`` (a file, or the index itself, which must then exist).

    Raises CheckpointError when it names files outside its folder or holds something other than names.
    """
    path = folder / f"{weights_name.removesuffix('.index.json')}.index.json"
    if not path.is_file():
        if path.name == weights_name:
            raise CheckpointError(f"'{weights_name}' does not lie beside the files it names; do not trust this folder.")
        return
    try:
        places = json.loads(path.read_text("utf-8"))["weight_map"]
        files = set(places.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"'{path.name}' is damaged; copy the folder again.") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"'{path.name}' names {file!r}, which is not a file beside it; do not trust this folder."
            )


def expected_sizes(
    headers: Mapping[Path, Header],
    layouts: Mapping[str, Layout],
    dense: Mapping[str, tuple[int, ...]],
    optional: set[str],
) -> dict[str, dict[str, int]]:
    """Hold the files' tensors against what the model expects; return each compressed module's data-dependent sizes.

    ``layouts``: compressed module -> its tensors; ``dense``: name -> shape of everything else; ``optional``: dense
    names that may be absent (tied weights). Raises CheckpointError naming the first three differences.
    """
    found = {name: info for header in headers.values() for name, info in header.tensors.items()}
    wrong: list[str] = []
    sizes: dict[str, dict[str, int]] = {}
    known: set[str] = set(dense) | optional
    for module, layout in layouts.items():
        own = {name: _described(found[f"{module}.{name}"]) for name in layout if f"{module}.{name}" in found}
        known.update(f"{module}.{name}" for name in layout)
        try:
            sizes[module] = bind(layout, own, module)
        except FormatError as failure:
            wrong.append(str(failure))
    for name, shape in dense.items():
        if name not in found:
            if name not in optional:
                wrong.append(f"tensor '{name}' is missing")
        elif found[name].shape != shape:
            wrong.append(f"tensor '{name}' has shape {list(found[name].shape)}, expected {list(shape)}")
    wrong += [f"tensor '{name}' is not part of the model" for name in sorted(set(found) - known)]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError(f"The weight files do not fit the model: {'; '.join(wrong[:3])}{more}.")
    return sizes


def check_digests(headers: Mapping[Path, Header], manifest: Manifest, must: Iterable[str]) -> None:
    """Compare stored bytes with their recorded hashes. ``must``: names that need one (the compressed tensors).

    Raises CheckpointError naming the first tensor whose bytes changed, or saying that hashes are missing.
    """
    needed = set(must)
    for path, header in headers.items():
        try:
            recorded = json.loads(header.metadata.get(METADATA_KEY, ""))
            belongs, hashes = recorded["manifest"], dict(recorded["tensors"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CheckpointError(f"'{path.name}' lacks rarefy's metadata; copy the folder again.") from None
        if belongs != manifest.digest():
            raise CheckpointError(
                f"'{path.name}' does not belong to this config.json, whose quantization_config was changed; "
                "copy both again."
            )
        unproven = sorted(name for name in needed & set(header.tensors) if name not in hashes)
        if unproven:
            raise CheckpointError(f"'{path.name}' has no hash for tensor '{unproven[0]}'; copy the folder again.")
        _compare(path, header, {name: value for name, value in hashes.items() if name in header.tensors})


def _compare(path: Path, header: Header, hashes: Mapping[str, str]) -> None:
    if not hashes:
        return
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            for name, expected in hashes.items():
                info = header.tensors[name]
                piece = view[header.data_start + info.start : header.data_start + info.stop]
                actual = tensor_digest(info.dtype, info.shape, piece)
                piece.release()
                if actual != expected:
                    raise CheckpointError(f"Tensor '{name}' in '{path.name}' is damaged; copy the file again.")
        finally:
            view.release()


def _described(info: TensorInfo) -> tuple[torch.dtype | None, tuple[int, ...]]:
    return DTYPES.get(info.dtype), info.shape
