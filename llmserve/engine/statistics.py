"""Counters of one model, over all engines that ever ran it."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple


class Statistics(NamedTuple):
    """A snapshot. Tokens are those of ended generations, `accepted_tokens` the drafted ones that were right; times are in
    seconds, `last_used` in Unix time."""

    requests: int = 0
    errors: int = 0
    cancelled: int = 0
    crashes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    last_used: float | None = None

    @property
    def tokens(self) -> int:
        """Those of prompts and of answers."""
        return self.prompt_tokens + self.output_tokens


class StatisticsCounter:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current = Statistics()  # guarded by _lock

    def add(self, **amounts: int) -> None:
        """Add to counters by name."""
        with self._lock:
            now = {name: getattr(self._current, name) + amount for name, amount in amounts.items()}
            self._current = self._current._replace(**now)

    def note_load(self, seconds: float) -> None:
        """Count a load; `load_seconds` is the last one's."""
        with self._lock:
            self._current = self._current._replace(loads=self._current.loads + 1, load_seconds=seconds)

    def touch(self) -> None:
        """Note that the model was just used."""
        with self._lock:
            self._current = self._current._replace(last_used=time.time())

    def snapshot(self) -> Statistics:
        with self._lock:
            return self._current
