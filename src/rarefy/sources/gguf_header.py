"""Reading a GGUF file: metadata and tensor table checked before use, tensors decoded one at a time to float32.

Layout (version 2 or 3, little-endian): magic, version, tensor count, metadata count; metadata as key, type, value;
the tensor table as name, shape with the fastest axis first, type, offset; aligned tensor data. The block types are
decoded by the ``gguf`` package; the header is read here because that package builds an array object for every
token of the vocabulary, which takes seconds, and trusts the lengths that a damaged file states.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from rarefy.core.errors import SourceError, UnsupportedError

if TYPE_CHECKING:
    import torch

STRING, ARRAY = 8, 9
# GGUF value type -> struct code.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_AXES = 4


class GgufTensor(NamedTuple):
    """Where one tensor lies: shape with the slowest axis first ([out, in]), block type name, absolute byte range."""

    shape: tuple[int, ...]
    type: str
    start: int
    nbytes: int


class GgufFile(NamedTuple):
    """A GGUF file's metadata (scalars, strings, lists of either) and its tensor table."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def read(self, name: str) -> torch.Tensor:
        """Tensor ``name`` as a new contiguous float32 tensor; raises SourceError when it holds NaN or infinity."""
        import numpy as np
        import torch

        gguf = import_gguf(self.path)
        info = self.tensors[name]
        raw = np.fromfile(self.path, dtype=np.uint8, count=info.nbytes, offset=info.start)
        try:
            values = gguf.dequantize(raw.reshape(*info.shape[:-1], -1), gguf.GGMLQuantizationType[info.type])
        except NotImplementedError:
            raise UnsupportedError(
                f"Tensor '{name}' of '{self.path.name}' has block type {info.type}, which the installed gguf package "
                "cannot decode; upgrade gguf or use another quantization of this model."
            ) from None
        if not np.isfinite(values).all():
            raise SourceError(f"Tensor '{name}' of '{self.path.name}' holds NaN or infinity; get the file again.")
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32).reshape(info.shape))


def import_gguf(path: Path) -> ModuleType:
    """The ``gguf`` package; SourceError with the command that installs it when it is absent."""
    try:
        import gguf
    except ImportError:
        raise SourceError(f"Reading '{path.name}' needs the gguf package; run: pip install gguf") from None
    return gguf


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file without touching its tensors.

    Raises SourceError when the file is not GGUF, truncated or contradictory, UnsupportedError for a version, a block
    type or a split file that cannot be read.
    """
    gguf = import_gguf(path)
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise SourceError(f"'{path.name}' is not a GGUF file; get it again.")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                fields, table, end = _Cursor(data, path).header()
            except (struct.error, UnicodeDecodeError):
                raise _damaged(path) from None
            file_bytes = len(data)
    if fields.get("split.count", 1) not in (0, 1):
        raise UnsupportedError(
            f"'{path.name}' is one of {fields['split.count']} parts; join them with 'llama-gguf-split --merge' first."
        )
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise _damaged(path)
    base = -(-end // alignment) * alignment
    tensors = {name: _place(gguf, path, name, entry, base) for name, entry in table.items()}
    if any(info.start + info.nbytes > file_bytes for info in tensors.values()):
        raise SourceError(f"'{path.name}' is truncated; get it again.")
    return GgufFile(path, fields, tensors)


def _place(
    gguf: ModuleType, path: Path, name: str, entry: tuple[tuple[int, ...], int, int], base: int
) -> GgufTensor:
    shape, code, offset = entry
    try:
        kind = gguf.GGMLQuantizationType(code)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise UnsupportedError(
            f"Tensor '{name}' of '{path.name}' has block type {code}, which the installed gguf package does not know; "
            "upgrade gguf or use another quantization of this model."
        ) from None
    if shape[-1] % block:
        raise _damaged(path)
    return GgufTensor(shape, kind.name, base + offset, math.prod(shape) // block * block_bytes)


def _damaged(path: Path) -> SourceError:
    return SourceError(f"'{path.name}' has a damaged GGUF header; get it again.")


class _Cursor:
    """A position in the mapped file; every length is checked against what is left before anything is read."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 4

    def header(self) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
        (version,) = self.take("I")
        if version not in (2, 3):
            raise UnsupportedError(f"'{self.path.name}' is not GGUF version 2 or 3, little-endian; convert it again.")
        tensor_count, field_count = self.take("QQ")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self.string()
            if key in fields:
                raise _damaged(self.path)
            fields[key] = self.value(*self.take("I"))
        table = {}
        for _ in range(tensor_count):
            name = self.string()
            (axes,) = self.take("I")
            if name in table or not 1 <= axes <= MAX_AXES:
                raise _damaged(self.path)
            shape = self.take(f"{axes}Q")[::-1]
            if 0 in shape:
                raise _damaged(self.path)
            table[name] = (shape, *self.take("IQ"))
        return fields, table, self.at

    def take(self, codes: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + codes, self.data, self.at)
        self.at += struct.calcsize("<" + codes)
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        raw = self.data[self.at : self.at + length]
        if len(raw) != length:
            raise _damaged(self.path)
        self.at += length
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise _damaged(self.path)
        item, count = self.take("IQ")
        if item == STRING:
            self.expect(8 * count)
            return [self.string() for _ in range(count)]
        if item not in SCALARS:
            raise _damaged(self.path)
        self.expect(struct.calcsize("<" + SCALARS[item]) * count)
        return list(self.take(f"{count}{SCALARS[item]}"))

    def expect(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise _damaged(self.path)
