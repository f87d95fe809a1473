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
    STOP = "stop"  # an EOS token, a stop string, or the end of a grammar
    LENGTH = "length"  # max_tokens, or a grammar that cannot go on


class SamplingParams(NamedTuple):
    """How the next token is chosen. The defaults sample from the model's own distribution.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0, `repetition_penalty` 1 and the other penalties 0 are off.
    `seed` None draws a fresh one. `logit_bias` adds to the scores of token ids.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


class Grammar(NamedTuple):
    """What an answer is kept within: "json_schema" (`text` is the schema's JSON), "regex" (the whole answer matches it) or "lark"."""

    kind: str
    text: str


class GenerationParams(NamedTuple):
    """What one generation is to make: `n` choices of at most `max_tokens` each, sampled separately from one prompt.

    No choice ends within its first `min_tokens`, or with `ignore_eos` by an EOS token; `stop_token_ids` end one like EOS does.
    `logprobs` asks for the scores of the choices' tokens with so many alternatives, and with `prompt_logprobs` for the prompt's too.
    `opening`: what the prompt ends with and every choice's text begins with: the opener of a block that the template wrote.
    """

    max_tokens: int
    n: int = 1
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = SamplingParams()
    grammar: Grammar | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    opening: str = ""


class TokenScore(NamedTuple):
    """A token's logarithmic probability in the model's own distribution, and those of the likeliest in its place, likeliest first.

    `piece` has the token's bytes, but for what a stop string cut off. `logprob` None: the first token of a prompt.
    """

    piece: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()


class PromptScores(NamedTuple):
    """The scores of every token of the prompt, before the first delta of `choice`."""

    choice: int
    tokens: tuple[TokenScore, ...]


class Delta(NamedTuple):
    """New text of one choice: never half a character, never part of a stop string; never empty without `tokens`.

    `tokens` are those that the text ends with it, when they were asked for.
    """

    choice: int
    text: str
    tokens: tuple[TokenScore, ...] = ()


class ChoiceEnd(NamedTuple):
    """One choice is complete. `num_output_tokens` counts every sampled token but EOS: stop strings' tokens too."""

    choice: int
    finish_reason: FinishReason
    num_output_tokens: int


class Embedding(NamedTuple):
    """The vector of the text at index `choice`, of length 1: little-endian float32."""

    choice: int
    vector: bytes


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


Event = PromptScores | Delta | ChoiceEnd | Embedding | GenerationEnd | Failed


class Generation:
    """The event log of one request in an engine. Thread-safe: one engine publishes, any number of readers follow.

    A reader keeps its own cursor (the number of events it has seen), so several clients can share one generation. The
    log ends with `GenerationEnd` or `Failed`. It is bounded by `n * (max_tokens + 2)` events and one of the prompt's scores.
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
