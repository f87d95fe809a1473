"""Divide the machine's cores among the forward passes that run at one moment, of all slots and all models together.

ggml's threads spin while they wait for each other, so passes that together use more threads than there are cores slow
each other down thirtyfold. Every pass therefore leases its threads here first.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class ComputeBudget:
    """The cores forward passes may use. Thread-safe; waiting passes are served in the order they came."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._lock = threading.Lock()
        self._free = cores  # guarded by _lock; -1 while one pass more runs than there are cores
        self._num_sharers = 0  # guarded by _lock: who makes passes at present
        self._num_leases = 0  # guarded by _lock: passes running, and processes that have cores
        self._waiting: deque[_Waiting] = deque()  # guarded by _lock
        self._leased: list[Lease] = []  # guarded by _lock: of processes that have cores

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

    def acquire(self, at_most: int) -> int:
        """Wait for cores, FIFO, and take a fair part of them: the number of threads the pass may use. Pair with `release`."""
        with self._lock:
            if self._has_room and not self._waiting:
                return self._grant(at_most)
            ticket = Ticket(at_most)
            self._wait(ticket)
        return ticket.wait()

    def release(self, threads: int) -> None:
        """Give back what `acquire` returned; it goes to whoever waits longest."""
        with self._lock:
            self._take_back(threads)

    def lease(self, grant: Callable[[int], None], recall: Callable[[], None]) -> Lease:
        """A way for another process to have cores. Both functions are called with a lock held, and must not wait."""
        return Lease(self, grant, recall)

    def _wait(self, waiting: _Waiting) -> None:
        """Caller holds the lock."""
        self._waiting.append(waiting)
        self._recall()

    def _take_back(self, threads: int) -> None:
        """Caller holds the lock."""
        self._free += threads
        self._num_leases -= 1
        self._serve()
        if self._waiting:
            self._recall()
        else:
            self._recall_if_unfit()

    def _serve(self) -> None:
        """Give free cores to those who wait longest. Caller holds the lock."""
        while self._has_room and self._waiting:
            waiting = self._waiting.popleft()
            waiting.grant(self._grant(waiting.at_most))

    def _recall_if_unfit(self) -> None:
        """Divide the cores anew if some are free that nobody is about to take. Caller holds the lock."""
        if self._free > 0 and not self._waiting and self._num_sharers <= self._num_leases:
            self._recall()

    def _recall(self) -> None:
        """Caller holds the lock."""
        for lease in self._leased:
            lease.recall()

    @property
    def _has_room(self) -> bool:
        """Whether a pass may begin: also one more than there are cores when all have one thread, and so do not spin.

        A core then goes on with it at once when a pass has ended, and does not wait for a thread to wake. Caller holds the lock.
        """
        return self._free > 0 or (self._free == 0 and self._num_leases == self.cores > 1)

    def _grant(self, at_most: int) -> int:
        """Free cores divided by the sharers without a lease, so that all cores are used and nobody is left without."""
        num_idle_sharers = max(1, self._num_sharers - self._num_leases)
        threads = min(at_most, max(1, self._free // num_idle_sharers))
        self._free -= threads
        self._num_leases += 1
        return threads


class _Waiting(Protocol):
    """Who waits for cores, and how many it can use."""

    at_most: int

    def grant(self, threads: int) -> None: ...


class Ticket:
    """A pass that waits. The lock is held until cores are granted."""

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most
        self._threads = 0
        self._granted = threading.Lock()
        self._granted.acquire()

    def grant(self, threads: int) -> None:
        self._threads = threads
        self._granted.release()

    def wait(self) -> int:
        self._granted.acquire()
        return self._threads


class Lease:
    """Cores that another process has for all its passes, until it is asked to give them back. Thread-safe.

    They are recalled when somebody waits for cores, and when some are free that nobody else is about to take: so a process that
    works alone asks once, and several come by their share.
    """

    def __init__(self, budget: ComputeBudget, grant: Callable[[int], None], recall: Callable[[], None]) -> None:
        self.at_most = budget.cores
        self._budget = budget
        self._lock = budget._lock
        self._grant = grant
        self._recall = recall
        self._threads = 0  # guarded by _lock; those it has
        self._recalled = False  # guarded by _lock
        self._shares = False  # guarded by _lock
        self._closed = False  # guarded by _lock

    def share(self, *, active: bool) -> None:
        """Count the process as one that makes passes, or not any more."""
        with self._lock:
            if active == self._shares or self._closed:
                return
            self._shares = active
            self._budget._num_sharers += 1 if active else -1
            if not active:
                if self._threads and self._budget._num_sharers:
                    self.recall()
                self._budget._recall_if_unfit()

    def request(self) -> None:
        """The process wants cores: `grant` is called with their number, now or when it is its turn."""
        with self._lock:
            budget = self._budget
            if self._closed:
                return
            if budget._free > 0 and not budget._waiting:
                self.grant(budget._grant(self.at_most))
            else:
                budget._wait(self)

    def give_back(self) -> None:
        """The process has given back what it had."""
        with self._lock:
            self._end()

    def close(self) -> None:
        """The process is gone, and whatever it had or waited for."""
        self.share(active=False)
        with self._lock:
            self._closed = True
            if self in self._budget._waiting:
                self._budget._waiting.remove(self)
            self._end()

    def grant(self, threads: int) -> None:
        """The budget's side. Its caller holds the lock."""
        self._threads, self._recalled = threads, False
        self._budget._leased.append(self)
        self._grant(threads)

    def recall(self) -> None:
        """The budget's side: once for each grant. Its caller holds the lock."""
        if not self._recalled:
            self._recalled = True
            self._recall()

    def _end(self) -> None:
        """Caller holds the lock."""
        threads, self._threads = self._threads, 0
        if threads:
            self._budget._leased.remove(self)
            self._budget._take_back(threads)


class Passes:
    """One model's forward passes: each leases its cores, as many as helped the passes before it. Thread-safe.

    `threads_linger`: whether the library's threads go on spinning for a moment when a pass has ended, as libgomp's do.
    """

    def __init__(
        self, budget: ComputeBudget, clock: Callable[[], float] = time.monotonic, *, threads_linger: bool = False
    ) -> None:
        self._budget = budget
        self._clock = clock
        self._threads_linger = threads_linger
        self._guard = StallGuard(budget.cores)

    @contextmanager
    def lease(self, num_tokens: int) -> Iterator[int]:
        """Wait for cores for one pass of `num_tokens`, and have them within the block: the number of threads it may use."""
        threads = self._budget.acquire(at_most=self._guard.limit(num_tokens))
        try:
            begun = self._clock()
            yield threads
            if not self._budget.contended:  # else the other passes' threads would be counted
                free_cores = count_free_cores(self._budget.cores, num_own=threads if self._threads_linger else 1)
                self._guard.observe(num_tokens, threads, self._clock() - begun, free_cores)
        finally:
            self._budget.release(threads)


_CALIBRATING_PASSES = 3  # with one thread, when a model is new
_STALLED = 1.2  # times a single-threaded pass
_FIRST_PENALTY = 2  # passes
_LONGEST_PENALTY = 256
_FORGIVEN_AFTER = 16  # good passes


class StallGuard:
    """How many threads a model's passes should use at most while other programs want cores too. Thread-safe.

    Threads help only while each has a core to itself. When another program takes one, the others spin until it is given
    back, and a pass takes many times as long as it would with a single thread. Two things tell:

    - What else is runnable when a pass ends. Whoever reads the answer has long gone back to sleep by then, so what is seen
      in two passes running is a program at work, and its cores are left to it.
    - How long a pass took. One that took longer than a single-threaded one has stalled: the next ones use half as many
      threads. How many passes do so doubles with every stall that follows soon, up to a bound; then one tries again.
      It is the only thing that tells of a host that gives a virtual core to another guest.
    """

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._lock = threading.Lock()
        self._single: dict[int, _Average] = {}  # guarded by _lock: by the size of a pass, seconds a token with one thread
        self._limit = cores  # guarded by _lock
        self._num_limited = 0  # guarded by _lock: passes until the limit is lifted
        self._penalty = _FIRST_PENALTY  # guarded by _lock: passes
        self._num_good = 0  # guarded by _lock: passes without a limit since the last stall
        self._free_cores = (cores, cores)  # guarded by _lock: left by other programs, in the last two passes

    def limit(self, num_tokens: int) -> int:
        """Most threads of the next pass, which is of so many tokens."""
        with self._lock:
            if num_tokens == 1 and self._single_seconds(num_tokens) is None:
                return 1  # longer passes are judged by it, and would take too long to find out about themselves
            return max(1, min(self._limit, max(self._free_cores)))

    def observe(self, num_tokens: int, threads: int, seconds: float, free_cores: int) -> None:
        """Learn from a pass, and from the number of cores that nobody else wanted when it ended."""
        with self._lock:
            self._free_cores = (self._free_cores[1], free_cores)
            if threads == 1:
                self._single.setdefault(_size(num_tokens), _Average()).add(seconds / num_tokens)
            elif seconds > _STALLED * (self._single_seconds(num_tokens) or seconds):
                self._note_stall(threads)
                return
            if self._num_limited:
                self._num_limited -= 1
                self._limit = self._limit if self._num_limited else self._cores
            else:
                self._num_good += 1
                self._penalty = _FIRST_PENALTY if self._num_good >= _FORGIVEN_AFTER else self._penalty

    def _single_seconds(self, num_tokens: int) -> float | None:
        """How long a pass takes with one thread, at most: by the longest known one that is no longer, for many tokens take less each."""
        known = [size for size, average in self._single.items() if size <= _size(num_tokens) and average.known]
        return num_tokens * self._single[max(known)].value if known else None

    def _note_stall(self, threads: int) -> None:
        self._limit, self._num_limited = threads // 2, self._penalty
        self._penalty = min(2 * self._penalty, _LONGEST_PENALTY)
        self._num_good = 0


class _Average:
    """A moving average, known after a few values."""

    def __init__(self) -> None:
        self.value = 0.0
        self._count = 0

    @property
    def known(self) -> bool:
        return self._count >= _CALIBRATING_PASSES

    def add(self, value: float) -> None:
        self._count += 1
        self.value += max(0.2, 1 / self._count) * (value - self.value)


def _size(num_tokens: int) -> int:
    """Passes of one size are between a power of two and the next."""
    return num_tokens.bit_length()


def count_free_cores(cores: int, num_own: int = 1) -> int:
    """Cores of the machine that no thread but `num_own` of the caller's wants at this moment, `cores` where the system does not tell.

    From the number of runnable threads in /proc/loadavg (proc(5)), which counts the whole machine, like `os.cpu_count`.
    """
    try:
        num_runnable = int(os.pread(_loadavg(), 64, 0).split()[3].partition(b"/")[0])
    except (OSError, ValueError, IndexError):
        return cores
    return (_cpu_count() or cores) - max(0, num_runnable - num_own)


_cpu_count = functools.cache(os.cpu_count)  # 25 µs


@functools.cache
def _loadavg() -> int:
    """Opened once, for every pass looks at it: 50 µs of a hundred less."""
    return os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
