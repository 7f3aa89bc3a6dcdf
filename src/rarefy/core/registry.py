"""Name -> class tables, one per family (grids, recipes, ...), so that a new method is one decorated class."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from rarefy.core.errors import RarefyError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named classes of one ``family``; names are unique, and an unknown name suggests the nearest."""

    def __init__(self, family: str, error: type[RarefyError]):
        self.family = family
        self._error = error
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. Registering the same class again (a module reload) replaces it; another one is refused."""

        def add(entry: type[T]) -> type[T]:
            known = self._entries.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (entry.__module__, entry.__qualname__):
                raise self._error(
                    f"{self.family} '{name}' is already registered by {known.__module__}; choose another name."
                )
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> type[T]:
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(self._entries)) or 'none'}."
            raise self._error(f"Unknown {self.family} '{name}'; {hint}")
        return self._entries[name]

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
