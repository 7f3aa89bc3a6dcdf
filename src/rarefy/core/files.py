"""Files that are whole or absent: atomic writes, staged folders, digests and safetensors headers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from rarefy.core.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from filelock import FileLock
    from torch import Tensor

# A header larger than this is an attack or garbage: 100,000 tensors need about 15 MB.
MAX_HEADER_BYTES = 64 * 1024 * 1024
# Torch itself stops at 64 dimensions; without limits, the product of a made-up shape could take hours.
MAX_DIMENSIONS = 64
MAX_EXTENT = 2**63 - 1


class TensorInfo(NamedTuple):
    """Where one tensor lies in a safetensors file: safetensors dtype name, shape, and byte range after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Header(NamedTuple):
    """A safetensors file's header: its tensors, its string metadata, and the offset of the first tensor byte."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}
# Names that the format knows, but that no whole number of bytes holds one of.
SUB_BYTE_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2"})


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write so that ``path`` holds either its old or its whole new content, also after a crash. Raises OSError."""
    draft = _beside(path)
    try:
        with draft.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], lasting: bool = True) -> None:
    """Write a safetensors file that is whole or absent; one that is not ``lasting`` need not survive a power cut, and
    nobody waits for the disk. Raises OSError, also where the library has its own error."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    draft = _beside(path)
    try:
        save_file(tensors, draft, metadata=metadata)
        os.chmod(draft, 0o644)  # the library writes for this user only
        if lasting:
            with draft.open("rb+") as stream:
                os.fsync(stream.fileno())
        os.replace(draft, path)
    except SafetensorError as failure:
        draft.unlink(missing_ok=True)
        raise _as_os_error(failure, path) from failure
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _as_os_error(failure: Exception, path: Path) -> OSError:
    """What the machine said, out of the words that safetensors puts around it."""
    number = re.search(r"os error (\d+)", str(failure))
    if number is None:
        return OSError(f"writing {path.name}: {failure}")
    return OSError(int(number[1]), os.strerror(int(number[1])), path.name)


@contextmanager
def staged_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a fresh folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes when it fails.

    With ``overwrite`` the old folder is replaced as a whole, and only after the block has ended well.
    Raises OptionError when ``out`` may not be written (see `check_out`) or its place cannot be.
    """
    check_out(out, overwrite)
    out = out.resolve()
    stage = _beside(out)
    try:
        stage.mkdir(parents=True)
    except OSError as failure:
        raise OptionError(f"--out '{out}' cannot be written ({failure.strerror}); name another folder.") from None
    try:
        yield stage
        if out.exists():
            _swap(stage, out)
        else:
            os.replace(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _swap(new: Path, out: Path) -> None:
    old = _beside(out)
    os.replace(out, old)
    try:
        os.replace(new, out)
    except BaseException:
        os.replace(old, out)
        raise
    shutil.rmtree(old)


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, hence on the same disk, where a rename is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def check_out(out: Path, overwrite: bool) -> None:
    """Raise OptionError unless ``out`` may be written: absent, an empty folder, or any folder with ``overwrite``.

    A folder that cannot be replaced as a whole (a mount point), or whose loss nobody means (the home folder, the
    current folder and those around it), is refused even so.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OptionError(f"--out '{out}' is not a folder; name another path.")
    place, here = out.resolve(), Path.cwd()
    if place in (here, *here.parents, Path(os.path.expanduser("~")).resolve()) or os.path.ismount(place):
        raise OptionError(f"--out '{out}' is a folder that must stay; name a new folder inside it.")
    if not overwrite and any(out.iterdir()):
        raise OptionError(f"--out '{out}' is not empty; name another folder or pass --overwrite.")


def lock_folder(folder: Path) -> FileLock:
    """Make ``folder`` and lock it for this process. Raises OptionError when another one has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise OptionError(f"--work-dir '{folder}' is in use by another process; wait for it or name another.") from None
    except OSError as failure:
        raise OptionError(f"--work-dir '{folder}' cannot be written ({failure.strerror}); name another.") from None
    return lock


def sha256_file(path: Path) -> str:
    """The hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file without touching its tensors.

    Raises CheckpointError when the file is missing or truncated, the header is not what the format demands, or byte
    ranges overlap, leave gaps or disagree with shape and dtype.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"'{path.name}' is truncated or not a safetensors file; copy it again.")
            raw = stream.read(length)
    except OSError as failure:
        raise CheckpointError(f"'{path.name}' cannot be read ({failure.strerror}); copy it again.") from None
    entries = _parse_header(path, raw)
    metadata = entries.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"'{path.name}' has damaged safetensors metadata; copy it again.")
    tensors = {name: _tensor_info(path, name, entry) for name, entry in entries.items()}
    _check_ranges(path, tensors, size - 8 - length)
    return Header(tensors, metadata, 8 + length)


def _parse_header(path: Path, raw: bytes) -> dict[str, object]:
    try:
        # Decoded here since json would also take UTF-16 and UTF-32, which the format does not know.
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_refuse_twins)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise CheckpointError(f"'{path.name}' has a damaged safetensors header; copy it again.")
    return entries


def _refuse_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("duplicate key")
    return entries


def _tensor_info(path: Path, name: str, entry: object) -> TensorInfo:
    wrong = CheckpointError(f"'{path.name}' describes tensor '{name}' wrongly; copy the file again.")
    if not isinstance(entry, Mapping):
        raise wrong
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise wrong
    if dtype in SUB_BYTE_DTYPES:
        raise CheckpointError(
            f"'{path.name}' stores tensor '{name}' as '{dtype}', which rarefy does not read; "
            "use a release of the model in a wider dtype."
        )
    if dtype not in DTYPE_BYTES or offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise wrong
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: object) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of whole numbers that a shape can have; JSON's true and false are not numbers."""
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item <= MAX_EXTENT for item in value)


def _check_ranges(path: Path, tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position:
            raise CheckpointError(f"'{path.name}' has overlapping or missing bytes at tensor '{name}'; copy it again.")
        position = info.stop
    if position != data_bytes:
        raise CheckpointError(
            f"'{path.name}' holds {data_bytes} tensor bytes where its header says {position}; copy it again."
        )
