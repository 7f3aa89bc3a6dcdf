"""The hidden states between two blocks, for every batch: in memory, or in files that survive the process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rarefy.core.files import write_text


class Stream(Protocol):
    """Hidden states by batch. What is written belongs to the next block, and is read after ``commit``."""

    def read(self, batch: int) -> Tensor: ...

    def write(self, batch: int, hidden: Tensor) -> None: ...

    def commit(self) -> None: ...


class MemoryStream:
    """In host memory; a block's outputs replace its inputs batch by batch."""

    def __init__(self, batches: int):
        self._held: list[Tensor | None] = [None] * batches

    def read(self, batch: int) -> Tensor:
        held = self._held[batch]
        assert held is not None
        return held

    def write(self, batch: int, hidden: Tensor) -> None:
        self._held[batch] = hidden.detach().to("cpu", copy=True)

    def commit(self) -> None:
        """Nothing: reads see what was written last."""


class FileStream:
    """In two memory-mapped files: a block's inputs stay whole until all its outputs are on disk.

    ``shapes`` are those of all batches. ``generation`` counts commits; its parity says which file is current, so a
    job that stopped anywhere finds the inputs of the block that it has to do again.
    """

    def __init__(self, folder: Path, name: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype, generation: int):
        self.shapes, self.dtype, self.generation = [tuple(shape) for shape in shapes], dtype, generation
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape in self.shapes]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / f"{name}.json"
        described = {"shapes": [list(shape) for shape in self.shapes], "dtype": str(dtype)}
        if not about.is_file() or json.loads(about.read_text("utf-8")) != described:
            write_text(about, json.dumps(described))
        self._maps = [self._open(folder / f"{name}-{side}.bin") for side in (0, 1)]

    def _open(self, path: Path) -> Any:
        size = max(1, int(self._starts[-1]))
        if not path.is_file() or path.stat().st_size != size:
            with path.open("wb") as stream:
                _reserve(stream, size)
        return np.memmap(path, dtype=np.uint8, mode="r+", shape=(size,))

    def read(self, batch: int) -> Tensor:
        return self._view(self.generation % 2, batch)

    def write(self, batch: int, hidden: Tensor) -> None:
        self._view((self.generation + 1) % 2, batch).copy_(hidden.detach())

    def commit(self) -> None:
        self._maps[(self.generation + 1) % 2].flush()
        self.generation += 1

    def _view(self, side: int, batch: int) -> Tensor:
        raw = torch.from_numpy(self._maps[side][self._starts[batch] : self._starts[batch + 1]])
        return raw.view(self.dtype).view(self.shapes[batch])


def _reserve(stream: Any, size: int) -> None:
    """Take the disk space now: a mapped file that meets a full disk later would kill the process."""
    import os

    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(stream.fileno(), 0, size)
    else:
        stream.truncate(size)
