"""Counters of one model, over all engines that ever ran it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Statistics:
    """A snapshot. Tokens are those of ended generations; times are in seconds, `last_used` in Unix time."""

    requests: int = 0
    errors: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    last_used: float | None = None


class StatisticsCounter:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current = Statistics()  # guarded by _lock

    def add(self, **amounts: float) -> None:
        """Add to counters by name; `load_seconds` is replaced, for the last load's is what people ask for."""
        with self._lock:
            now = {name: getattr(self._current, name) + amount for name, amount in amounts.items() if name != "load_seconds"}
            if "load_seconds" in amounts:
                now["load_seconds"] = amounts["load_seconds"]
            self._current = replace(self._current, **now)

    def touch(self) -> None:
        """Note that the model was just used."""
        with self._lock:
            self._current = replace(self._current, last_used=time.time())

    def snapshot(self) -> Statistics:
        with self._lock:
            return self._current
