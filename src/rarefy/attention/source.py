"""Keys and values of one layer as plans read them: plain tensors, or a store whose past may be in code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from rarefy.kv.attend import read
from rarefy.kv.store import LayerStore, SideState


class Source(ABC):
    """Keys and values ``[B, Hkv, length, D]``. ``state`` is what estimators keep of them from pass to pass."""

    state: dict[str, SideState]
    length: int
    heads: int

    @abstractmethod
    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys ``[start, stop)`` as attention reads them, in the model's dtype."""

    @abstractmethod
    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Values ``[start, stop)``."""


@dataclass
class Plain(Source):
    """Tensors of the whole length. Nothing outlives the pass, so what estimators keep is made anew in each."""

    key: Tensor
    value: Tensor
    state: dict[str, SideState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.length, self.heads = self.key.shape[2], self.key.shape[1]

    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.key[:, :, start:stop]

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.value[:, :, start:stop]


class Stored(Source):
    """A layer's store, whose state goes along when it is cropped, reordered or saved. Reading tokens that are in code
    decodes them."""

    def __init__(self, store: LayerStore):
        assert store.keys is not None and store.values is not None
        self.store, self.state = store, store.state
        self.length, self.heads = store.length, store.keys.tail.shape[1]
        self._whole: dict[str, Tensor] = {}

    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._read("keys", start, stop)

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._read("values", start, stop)

    def _read(self, label: Literal["keys", "values"], start: int, stop: int | None) -> Tensor:
        stop = self.length if stop is None else min(stop, self.length)
        if label in self._whole:
            return self._whole[label][:, :, start:stop]
        found = read(self.store, label, start, stop)
        if (start, stop) == (0, self.length):
            self._whole[label] = found
        return found
