"""The hidden states between two blocks, for every batch: in memory, or in files that survive the process."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rarefy.core.errors import OptionError
from rarefy.core.files import write_text


class Shelf(Protocol):
    """Hidden states by batch, on the host or on the device that computes."""

    def read(self, batch: int) -> Tensor: ...

    def write(self, batch: int, hidden: Tensor) -> None: ...

    def discard(self) -> None:
        """Give the space back; nothing is read or written any more."""


class Stream(Protocol):
    """Hidden states by batch. What is written belongs to the next block, and is read after ``commit``."""

    def read(self, batch: int) -> Tensor: ...

    def write(self, batch: int, hidden: Tensor) -> None: ...

    def commit(self) -> None: ...


class MemoryShelf:
    """In the memory of ``device``, in ``dtype``."""

    def __init__(self, batches: int, dtype: torch.dtype, device: torch.device | str):
        self._held: list[Tensor | None] = [None] * batches
        self._dtype, self._device = dtype, device

    def read(self, batch: int) -> Tensor:
        held = self._held[batch]
        assert held is not None
        return held

    def write(self, batch: int, hidden: Tensor) -> None:
        self._held[batch] = hidden.detach().to(self._device, self._dtype, copy=True)

    def discard(self) -> None:
        self._held = []


class FileShelf:
    """In one memory-mapped file. ``shapes`` are those of all batches."""

    def __init__(self, path: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype):
        self._path, self._shapes, self._dtype = path, [tuple(shape) for shape in shapes], dtype
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape in self._shapes]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        size = max(1, int(self._starts[-1]))
        if not path.is_file() or path.stat().st_size != size:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                _reserve(stream, size)
        self._map: Any = np.memmap(path, dtype=np.uint8, mode="r+", shape=(size,))

    def read(self, batch: int) -> Tensor:
        return torch.from_numpy(self._bytes(batch)).view(self._dtype).view(self._shapes[batch])

    def write(self, batch: int, hidden: Tensor) -> None:
        self.read(batch).copy_(hidden.detach())

    def checksum(self, batch: int) -> int:
        return zlib.crc32(self._bytes(batch))

    def flush(self) -> None:
        self._map.flush()

    def discard(self) -> None:
        self._map = None
        self._path.unlink(missing_ok=True)

    def _bytes(self, batch: int) -> Any:
        return self._map[self._starts[batch] : self._starts[batch + 1]]


class MemoryStream:
    """In the memory of ``device``; a block's outputs replace its inputs batch by batch."""

    def __init__(self, batches: int, dtype: torch.dtype, device: torch.device | str):
        self._shelf = MemoryShelf(batches, dtype, device)

    def read(self, batch: int) -> Tensor:
        return self._shelf.read(batch)

    def write(self, batch: int, hidden: Tensor) -> None:
        self._shelf.write(batch, hidden)

    def commit(self) -> None:
        """Nothing: reads see what was written last."""


class FileStream:
    """In two memory-mapped files: a block's inputs stay whole until all its outputs are on disk.

    ``shapes`` are those of all batches. ``generation`` counts commits; its parity says which file is current, so a
    job that stopped anywhere finds the inputs of the block that it has to do again. Raises OptionError when those of a
    ``generation`` that was committed before are not as they were then.
    """

    def __init__(self, folder: Path, name: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype, generation: int):
        self.generation = generation
        self._about = folder / f"{name}.json"
        self._described = {"shapes": [list(shape) for shape in shapes], "dtype": str(dtype)}
        paths = [folder / f"{name}-{side}.bin" for side in (0, 1)]
        self._sums: list[list[int]] = [[], []]
        whole = generation == 0 or all(path.is_file() for path in paths)
        if generation and whole:
            whole = self._recall()
        self._shelves = [FileShelf(path, shapes, dtype) for path in paths] if whole else []
        self._batches = len(self._described["shapes"])
        self._written: dict[int, int] = {}
        if generation and (not whole or self._current_sums() != self._sums[generation % 2]):
            raise OptionError(f"The activations in --work-dir '{folder.parent}' are damaged; delete the folder.")

    def read(self, batch: int) -> Tensor:
        return self._shelves[self.generation % 2].read(batch)

    def write(self, batch: int, hidden: Tensor) -> None:
        shelf = self._shelves[(self.generation + 1) % 2]
        shelf.write(batch, hidden)
        self._written[batch] = shelf.checksum(batch)

    def commit(self) -> None:
        self.generation += 1
        side = self.generation % 2
        self._shelves[side].flush()
        self._sums[side] = [self._written.get(batch, 0) for batch in range(self._batches)]
        self._written.clear()
        write_text(self._about, json.dumps({**self._described, "sums": self._sums}))

    def _current_sums(self) -> list[int]:
        shelf = self._shelves[self.generation % 2]
        return [shelf.checksum(batch) for batch in range(self._batches)]

    def _recall(self) -> bool:
        """Take over the checksums on disk; False when they are of something else."""
        try:
            known = json.loads(self._about.read_text("utf-8"))
            self._sums = [list(known["sums"][side]) for side in (0, 1)]
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return False
        return all(known.get(key) == value for key, value in self._described.items())


def _reserve(stream: Any, size: int) -> None:
    """Take the disk space now: a mapped file that meets a full disk later would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(stream.fileno(), 0, size)
    else:
        stream.truncate(size)
