"""Divide the machine's cores among the forward passes that run at one moment, of all slots and all models together.

ggml's threads spin while they wait for each other, so passes that together use more threads than there are cores slow
each other down thirtyfold. Every pass therefore leases its threads here first.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class ComputeBudget:
    """The cores forward passes may use. Thread-safe; waiting passes are served in the order they came."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._lock = threading.Lock()
        self._free = cores  # guarded by _lock
        self._num_sharers = 0  # guarded by _lock: who makes passes at present
        self._num_leases = 0  # guarded by _lock: passes running
        self._waiting: deque[_Ticket] = deque()  # guarded by _lock

    @contextmanager
    def share(self) -> Iterator[None]:
        """For as long as a sequence runs: count it as one that makes passes, so that others leave room for its own."""
        with self._lock:
            self._num_sharers += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_sharers -= 1

    @property
    def contended(self) -> bool:
        """Whether several sequences make passes at present, so that a long pass of one delays another."""
        with self._lock:
            return self._num_sharers > 1

    def acquire(self) -> int:
        """Wait for cores, FIFO, and take a fair part of them: the number of threads the pass may use. Pair with `release`."""
        with self._lock:
            if self._free and not self._waiting:
                return self._grant()
            ticket = _Ticket()
            self._waiting.append(ticket)
        ticket.granted.acquire()
        return ticket.threads

    def release(self, threads: int) -> None:
        """Give back what `acquire` returned; it goes to whoever waits longest."""
        with self._lock:
            self._free += threads
            self._num_leases -= 1
            while self._free and self._waiting:
                ticket = self._waiting.popleft()
                ticket.threads = self._grant()
                ticket.granted.release()

    def _grant(self) -> int:
        """Free cores divided by the sharers without a lease, so that all cores are used and nobody is left without."""
        num_idle_sharers = max(1, self._num_sharers - self._num_leases)
        threads = max(1, self._free // num_idle_sharers)
        self._free -= threads
        self._num_leases += 1
        return threads


class _Ticket:
    """A pass that waits for cores. The lock is held until they are granted."""

    def __init__(self) -> None:
        self.threads = 0
        self.granted = threading.Lock()
        self.granted.acquire()
