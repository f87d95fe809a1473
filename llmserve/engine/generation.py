"""What crosses the seam between an engine and its callers: parameters in, events out.

Knows nothing of models, threads that run them, HTTP or JSON. Parameters and events are plain picklable values, so an
engine may live in another process without its callers knowing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from llmserve.errors import APIError


class FinishReason(StrEnum):
    STOP = "stop"  # an EOS token or a stop string
    LENGTH = "length"  # max_tokens


class SamplingParams(NamedTuple):
    """How the next token is chosen. The defaults sample from the model's own distribution.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0, `repetition_penalty` 1 and the other penalties 0 are off.
    `seed` None draws a fresh one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


class GenerationParams(NamedTuple):
    """What one generation is to make: `n` choices of at most `max_tokens` each, sampled separately from one prompt."""

    max_tokens: int
    n: int = 1
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = SamplingParams()


class Delta(NamedTuple):
    """New text of one choice: never empty, never half a character, never part of a stop string."""

    choice: int
    text: str


class ChoiceEnd(NamedTuple):
    """One choice is complete. `num_output_tokens` counts every sampled token but EOS: stop strings' tokens too."""

    choice: int
    finish_reason: FinishReason
    num_output_tokens: int


class GenerationEnd(NamedTuple):
    """The last event of a generation that went well. Times are in seconds."""

    num_prompt_tokens: int
    num_cached_tokens: int
    queue_time: float
    prefill_time: float
    decode_time: float
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0


class Failed(NamedTuple):
    """The last event of a generation that did not."""

    error: APIError


Event = Delta | ChoiceEnd | GenerationEnd | Failed


class Generation:
    """The event log of one request in an engine. Thread-safe: one engine publishes, any number of readers follow.

    A reader keeps its own cursor (the number of events it has seen), so several clients can share one generation. The
    log ends with `GenerationEnd` or `Failed`. It is bounded by `n * (max_tokens + 2)` events.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._events: list[Event] = []  # guarded by _condition; append-only
        self._finished = False  # guarded by _condition
        self._closed = False  # one-way; read without the lock by the engine between two tokens

    def publish(self, event: Event) -> None:
        """Append an event. The engine's side; after the last event it does nothing."""
        with self._condition:
            if self._finished:
                return
            self._events.append(event)
            self._finished = isinstance(event, GenerationEnd | Failed)
            self._condition.notify_all()

    def read(self, cursor: int, timeout: float) -> list[Event]:
        """The events from `cursor` on; waits up to `timeout` seconds for the first. Empty: silence, or the log has ended."""
        with self._condition:
            if len(self._events) <= cursor and not self._finished:
                self._condition.wait(timeout)
            return self._events[cursor:]

    def close(self) -> None:
        """Cancel: the engine stops at the next token or prefill chunk. Safe at any time, from any thread, repeatedly."""
        self._closed = True

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def finished(self) -> bool:
        with self._condition:
            return self._finished

    def events(self, timeout: float) -> Iterator[Event]:
        """Every event up to the last, for a reader with nothing else to watch. TimeoutError after `timeout` seconds in all."""
        deadline = time.monotonic() + timeout
        cursor = 0
        while True:
            new = self.read(cursor, deadline - time.monotonic())
            cursor += len(new)
            yield from new
            if new and isinstance(new[-1], GenerationEnd | Failed):
                return
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no end of the generation within {timeout} s")
