"""Events of generations in, OpenAI's JSON out. Knows the wire format; knows no HTTP and no engine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from llmserve.api import JSON
from llmserve.api.context import unique
from llmserve.engine.generation import ChoiceEnd, Delta, Event, GenerationEnd, PromptScores, TokenScore

_LEAST_LOGPROB = -9999.0
"""OpenAI's value for what is very unlikely: JSON has no infinity."""


@dataclass(slots=True)
class Tally:
    """A request's generations in numbers, as far as their events have told. A prompt counts once, whatever the number of choices."""

    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_output_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)

    def add(self, event: Event) -> None:
        if isinstance(event, ChoiceEnd):
            self.num_output_tokens += event.num_output_tokens
            self.finish_reasons.append(event.finish_reason)
        elif isinstance(event, GenerationEnd):
            self.num_prompt_tokens = (self.num_prompt_tokens or 0) + event.num_prompt_tokens
            self.num_cached_tokens = (self.num_cached_tokens or 0) + event.num_cached_tokens

    def usage(self) -> JSON:
        prompt = self.num_prompt_tokens or 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": prompt + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(slots=True)
class Choice:
    """One choice as a whole. `tokens` and `prompt_tokens` are there when they were asked for."""

    index: int
    text: str = ""
    tokens: list[TokenScore] = field(default_factory=list)
    prompt_tokens: tuple[TokenScore, ...] = ()
    finish_reason: str = ""


def gather(num_choices: int, events: Iterable[Event], tally: Tally) -> list[Choice]:
    """The choices of all events of generations that ended well; counts them in `tally`."""
    choices = [Choice(index) for index in range(num_choices)]
    texts: list[list[str]] = [[] for _ in choices]
    for event in events:
        tally.add(event)
        if isinstance(event, Delta):
            texts[event.choice].append(event.text)
            choices[event.choice].tokens += event.tokens
        elif isinstance(event, PromptScores):
            choices[event.choice].prompt_tokens = event.tokens
        elif isinstance(event, ChoiceEnd):
            choices[event.choice].finish_reason = event.finish_reason
    for choice, parts in zip(choices, texts, strict=True):
        choice.text = "".join(parts)
    return choices


def head(prefix: str, kind: str, model_id: str) -> dict[str, JSON]:
    """What an answer, or each of its chunks, begins with."""
    return {"id": f"{prefix}-{unique()}", "object": kind, "created": int(time.time()), "model": model_id}


class ChoiceWriter(Protocol):
    """Writes the choices of a stream's chunks. May keep a state of each choice: a stream has its own."""

    def first(self, index: int) -> list[JSON]:
        """What is sent of a choice before anything is known of it."""
        ...

    def more(self, event: Event) -> list[JSON]:
        """What is sent when `event`, which is of one choice, has come."""
        ...


class ChunkStream:
    """The chunks of a stream, in the order that every client takes: the beginnings of all choices by index, text, each
    choice's finish reason, then, if asked for, the usage. `head` is what all of them have in common.
    """

    def __init__(
        self, head: dict[str, JSON], num_choices: int, include_usage: bool, writer: ChoiceWriter, num_prompts: int = 1
    ) -> None:
        self.ended = False
        self.tally = Tally()
        self._head = head
        self._nullable_usage = {"usage": None} if include_usage else {}
        self._writer = writer
        self._num_open = num_choices
        self._num_prompts = num_prompts
        self._held: list[JSON] = []

    def begin(self) -> list[JSON]:
        return [self._chunk(choice) for index in range(self._num_open) for choice in self._writer.first(index)]

    def add(self, events: Iterable[Event]) -> list[JSON]:
        """The chunks to send now. Those with the last finish reason wait for the end, so that they share its write:
        a client that stops reading at the first of two closes the connection.
        """
        chunks, self._held = self._held, []
        for event in events:
            self.tally.add(event)
            if isinstance(event, GenerationEnd):
                self._num_prompts -= 1
                continue
            self._num_open -= isinstance(event, ChoiceEnd)
            chunks += [self._chunk(choice) for choice in self._writer.more(event)]
        if not self._num_prompts and not self.ended:
            self.ended = True
            if self._nullable_usage:
                chunks.append(self._head | {"choices": [], "usage": self.tally.usage()})
        if not self._num_open and not self.ended:
            chunks, self._held = [], chunks
        return chunks

    def _chunk(self, choice: JSON) -> JSON:
        return self._head | {"choices": [choice]} | self._nullable_usage


# Chats.


class ChatWriter:
    """Chunks of a chat. `logprobs`: whether they were asked for."""

    def __init__(self, logprobs: bool = False) -> None:
        self._logprobs = logprobs

    def first(self, index: int) -> list[JSON]:
        return [self._choice(index, {"role": "assistant", "content": "", "refusal": None})]

    def more(self, event: Event) -> list[JSON]:
        if isinstance(event, Delta):
            logprobs = chat_logprobs(event.tokens) if self._logprobs else None
            return [self._choice(event.choice, {"content": event.text}, logprobs)]
        if isinstance(event, ChoiceEnd):
            return [self._choice(event.choice, {}, finish_reason=event.finish_reason)]
        return []

    def _choice(self, index: int, delta: JSON, logprobs: JSON = None, finish_reason: str | None = None) -> JSON:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_choice(choice: Choice, logprobs: bool = False) -> JSON:
    """A choice of a whole chat."""
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": chat_logprobs(choice.tokens) if logprobs else None,
        "finish_reason": choice.finish_reason,
    }


def chat_logprobs(tokens: Iterable[TokenScore]) -> JSON:
    content = [
        _chat_token(token.piece, token.logprob) | {"top_logprobs": [_chat_token(*each) for each in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(piece: bytes, value: float | None) -> dict[str, JSON]:
    return {"token": token_text(piece), "logprob": logprob(value), "bytes": list(piece)}


def token_text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def logprob(value: float | None) -> float | None:
    return None if value is None else max(value, _LEAST_LOGPROB)
