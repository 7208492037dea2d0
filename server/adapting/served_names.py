"""By which names requests use the sets of adapters that the engine knows by their contents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MOST = 128
"""Names that one label holds: a series must not grow without bound."""


class ServedNames:
    """One per engine, on its event loop. Routers that place requests by adapter read the names."""

    def __init__(self) -> None:
        self._using: dict[str, Counter[str]] = {}
        self._waiting: Counter[str] = Counter()

    @contextmanager
    def waiting(self, names: Iterable[str]) -> Iterator[None]:
        """While a request waits until the engine holds its adapters."""
        held = Counter(set(names))
        self._waiting.update(held)
        try:
            yield
        finally:
            self._waiting -= held

    @contextmanager
    def using(self, set_name: str, names: Iterable[str]) -> Iterator[None]:
        """While the engine has a request.

        Args:
            set_name: the name of its set, as the engine knows it.
            names: as clients write them.
        """
        held = Counter(set(names))
        self._using.setdefault(set_name, Counter()).update(held)
        try:
            yield
        finally:
            self._using[set_name] -= held
            if not self._using[set_name]:
                del self._using[set_name]

    def of(self, sets: Iterable[str]) -> list[str]:
        """The names by which some sets are used now, sorted, at most `MOST`."""
        names = {name for set_name in sets for name in self._using.get(set_name, ())}
        return sorted(names)[:MOST]

    def of_waiting(self, sets: Iterable[str]) -> list[str]:
        """Those of sets that wait in the engine, and of requests that wait to get there."""
        return sorted({*self.of(sets), *self._waiting})[:MOST]
