"""Least-recently-used entries on dict order, bounded by their number and their bytes. Holds no lock."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRU(Generic[K, V]):
    """A mapping that forgets. Not thread-safe: its owner locks.

    A dict keeps the order of insertion, so an entry that is taken out and put back becomes the youngest, and the first
    is always the one to go.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: dict[K, tuple[V, int]] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """The sizes of all entries together, as `put` was told them."""
        return self._num_bytes

    def get(self, key: K) -> V | None:
        """The value, now the most recently used, or None."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._entries[key] = entry
        return entry[0]

    def put(self, key: K, value: V, num_bytes: int) -> None:
        """Keep `value` in the place of an older one, and evict what no longer fits. One beyond the bounds is not kept."""
        self.evict(key)
        if num_bytes > self._max_bytes or self._max_entries < 1:
            return
        self._entries[key] = (value, num_bytes)
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes or len(self._entries) > self._max_entries:
            self.evict(next(iter(self._entries)))

    def evict(self, key: K) -> None:
        """Forget `key`, if it is there."""
        _, num_bytes = self._entries.pop(key, (None, 0))
        self._num_bytes -= num_bytes

    def clear(self) -> None:
        self._entries.clear()
        self._num_bytes = 0
