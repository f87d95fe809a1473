"""Whole answers, remembered and shared: the key of a request, single flight, replay.

Knows generations and their events; knows nothing of HTTP, of models, or of how an answer is written down.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llmserve.config import CacheConfig
from llmserve.engine.generation import Delta, Event, Failed, Generation, GenerationEnd, PromptScores, SamplingParams, TokenScore
from llmserve.lru import LRU

_ENTRY_BYTES = 1024  # of an entry beside its events: key, dict slot, the generation with its condition and lock

_SCORE_BYTES = 192  # of a token's score or an alternative's: a tuple, bytes and a number


class Outcome(StrEnum):
    HIT = "hit"  # repeated from memory
    MISS = "miss"  # generated, and remembered
    COALESCED = "coalesced"  # follows an identical request that was already under way
    BYPASS = "bypass"  # generated without looking


def key(sampling: SamplingParams, *shape: Any) -> bytes | None:
    """What identifies an answer, or None when chance decides it: neither greedy nor seeded.

    `shape` is everything else that shapes the answer, as JSON values. What has no effect on a greedy choice is left out,
    so requests that differ only in that share their answer.
    """
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty, sampling.logit_bias)
    if sampling.temperature == 0:
        chance: tuple[Any, ...] = ("greedy",)
    elif sampling.seed is not None:
        chance = (sampling.seed, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
    else:
        return None
    return hashlib.sha256(json.dumps((shape, penalties, chance), sort_keys=True).encode()).digest()


@dataclass(slots=True, eq=False)
class _Flight:
    """One generation under way and the clients that follow it. Fields are guarded by the cache's lock."""

    key: bytes | None
    store: bool
    readers: int = 0
    generation: Generation | None = None
    error: BaseException | None = None
    ended: bool = False
    settled: threading.Event = field(default_factory=threading.Event)  # `generation` or `error` is there


@dataclass(slots=True, eq=False)
class _Entry:
    """A remembered answer. `rendering` and `num_bytes` are guarded by the cache's lock."""

    key: bytes
    generation: Generation  # ended well
    stored_at: float
    num_bytes: int
    rendering: Any = None


class ResponseCache:
    """Answers by key. Thread-safe; `clock` gives seconds."""

    def __init__(self, config: CacheConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._enabled = config.max_entries > 0
        self._max_age = config.max_age or float("inf")
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: LRU[bytes, _Entry] = LRU(config.max_entries, config.max_bytes)  # guarded by _lock
        self._flights: dict[bytes, _Flight] = {}  # guarded by _lock; those that may be joined

    def find(self, key: bytes | None) -> Answer | None:
        """The answer remembered for `key`, if there is one. The caller closes it."""
        if key is None:
            return None
        with self._lock:
            return self._replay(key)

    def open(
        self, key: bytes | None, start: Callable[[], Generation], *, may_lookup: bool = True, may_store: bool = True
    ) -> Answer:
        """An answer for `key`: remembered, joined, or begun with `start`. The caller closes it.

        `start` is called without the lock, and once for all who ask for the same at the same time: if it raises, it
        raises for each of them. Without a key, or with the cache off, every request begins its own.
        """
        if key is None or not self._enabled or not may_lookup:
            return self._begin(_Flight(key, store=may_store, readers=1), start, Outcome.BYPASS)
        with self._lock:
            if (answer := self._replay(key)) is not None:
                return answer
            flight = self._flights.get(key)
            if flight is None or not _joinable(flight):
                flight = self._flights[key] = _Flight(key, store=may_store)
            flight.readers += 1
            first = flight.readers == 1
        return self._begin(flight, start, Outcome.MISS) if first else self._join(flight)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def _replay(self, key: bytes) -> Answer | None:
        """Caller holds the lock."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        age = self._clock() - entry.stored_at
        if age > self._max_age:
            self._entries.evict(key)
            return None
        return Answer(self, None, entry.generation, Outcome.HIT, age, entry)

    def _begin(self, flight: _Flight, start: Callable[[], Generation], outcome: Outcome) -> Answer:
        try:
            generation = start()
        except BaseException as error:
            with self._lock:
                flight.error = error
                self._land(flight)
            flight.settled.set()
            raise
        with self._lock:
            flight.generation = generation
        flight.settled.set()
        return Answer(self, flight, generation, outcome)

    def _join(self, flight: _Flight) -> Answer:
        """Wait for the one who begins it: for a tokenizer at most, never for a model."""
        flight.settled.wait()
        with self._lock:
            if flight.generation is not None:
                return Answer(self, flight, flight.generation, Outcome.COALESCED)
        assert flight.error is not None
        raise copy(flight.error)

    def _end(self, flight: _Flight, last: Event) -> None:
        """A reader has seen the last event: remember the answer if it is whole."""
        with self._lock:
            if flight.ended:
                return
            flight.ended = True
            self._land(flight)
            if flight.store and flight.key is not None and flight.generation is not None and isinstance(last, GenerationEnd):
                entry = _Entry(flight.key, flight.generation, self._clock(), _size(flight.generation))
                self._entries.put(flight.key, entry, entry.num_bytes)

    def _keep(self, entry: _Entry, rendering: Any, num_bytes: int) -> None:
        with self._lock:
            if entry.rendering is None and self._entries.get(entry.key) is entry:
                entry.rendering = rendering
                entry.num_bytes += num_bytes
                self._entries.put(entry.key, entry, entry.num_bytes)

    def _leave(self, flight: _Flight) -> None:
        """A reader is done; the last one before the end cancels the generation."""
        with self._lock:
            flight.readers -= 1
            if flight.readers or flight.ended or flight.generation is None:
                return
            self._land(flight)
            flight.generation.close()

    def _land(self, flight: _Flight) -> None:
        """Let nobody join any more. Caller holds the lock."""
        if flight.key is not None and self._flights.get(flight.key) is flight:
            del self._flights[flight.key]


class Answer:
    """One client's reading of a generation, from its first event on. Not thread-safe: the request's thread owns it."""

    def __init__(
        self,
        cache: ResponseCache,
        flight: _Flight | None,
        generation: Generation,
        outcome: Outcome,
        age: float | None = None,
        entry: _Entry | None = None,
    ) -> None:
        self.outcome = outcome
        self.age = age  # seconds since it was remembered; None when it was not
        self.ended = False
        self._cache = cache
        self._flight = flight
        self._generation = generation
        self._entry = entry
        self._cursor = 0

    @property
    def rendering(self) -> Any:
        """What `keep` was given when this answer was repeated before, else None."""
        return self._entry and self._entry.rendering

    def keep(self, rendering: Any, num_bytes: int) -> None:
        """Remember with a repeated answer what was made of it, of this size, so that it need not be made again."""
        if self._entry is not None:
            self._cache._keep(self._entry, rendering, num_bytes)

    def read(self, timeout: float) -> list[Event]:
        """The next events; waits up to `timeout` seconds for the first. Empty: silence, or the answer has ended."""
        if self.ended:
            return []
        events = self._generation.read(self._cursor, timeout)
        self._cursor += len(events)
        if events and isinstance(events[-1], GenerationEnd | Failed):
            self.ended = True
            if self._flight is not None:
                self._cache._end(self._flight, events[-1])
        return events

    def close(self) -> None:
        """Leave. Idempotent."""
        flight, self._flight = self._flight, None
        self.ended = True
        if flight is not None:
            self._cache._leave(flight)


def _joinable(flight: _Flight) -> bool:
    """Whether it has not failed; its readers may not have noticed yet. Caller holds the cache's lock."""
    generation = flight.generation
    return generation is None or not (generation.finished and isinstance(generation.read(-1, 0)[-1], Failed))


def _size(generation: Generation) -> int:
    """Bytes of memory that an ended generation takes as an entry."""
    events = generation.read(0, 0)
    texts = sum(sys.getsizeof(event.text) for event in events if isinstance(event, Delta))
    scores = sum(sum(map(_score_size, event.tokens)) for event in events if isinstance(event, Delta | PromptScores))
    return _ENTRY_BYTES + sys.getsizeof(events) + sum(map(sys.getsizeof, events)) + texts + scores


def _score_size(score: TokenScore) -> int:
    return _SCORE_BYTES * (1 + len(score.top))
