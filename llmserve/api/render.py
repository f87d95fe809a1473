"""Events of a generation in, OpenAI's JSON out. Knows the wire format; knows no HTTP and no engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmserve.api.fields import JSON
from llmserve.engine.generation import ChoiceEnd, Delta, Event, GenerationEnd


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks of an answer have in common. `created` is in Unix time."""

    id: str
    created: int
    model: str
    service_tier: str | None = None

    def render(self, kind: str) -> dict[str, JSON]:
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return fields | {"service_tier": self.service_tier} if self.service_tier else fields


def completion(head: Head, n: int, events: Sequence[Event]) -> JSON:
    """A whole chat completion, from all events of a generation that ended well."""
    ends = {event.index: event for event in events if type(event) is ChoiceEnd}
    last = events[-1]
    assert isinstance(last, GenerationEnd)
    choices = [_choice(events, ends[index]) for index in range(n)]
    usage = _usage(last, sum(end.num_output_tokens for end in ends.values()))
    return head.render("chat.completion") | {"choices": choices, "usage": usage}


def _choice(events: Sequence[Event], end: ChoiceEnd) -> JSON:
    text = "".join([event.text for event in events if type(event) is Delta and event.index == end.index])
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": end.index, "message": message, "logprobs": None, "finish_reason": end.finish_reason}


class ChunkStream:
    """The chunks of a streamed chat, in the order that every client takes: the roles of all choices by index, text, each
    choice's finish reason, then, if asked for, the usage.
    """

    def __init__(self, head: Head, n: int, include_usage: bool) -> None:
        self.ended = False
        self._fields = head.render("chat.completion.chunk")
        self._nullable_usage = {"usage": None} if include_usage else {}
        self._num_open = n
        self._num_output_tokens = 0
        self._held: list[JSON] = []

    def begin(self) -> list[JSON]:
        role = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, role, None) for index in range(self._num_open)]

    def add(self, events: Iterable[Event]) -> list[JSON]:
        """The chunks to send now. Those with the last finish reason wait for the end, so that they share its write:
        a client that stops reading at the first of two closes the connection.
        """
        chunks, self._held = self._held, []
        for event in events:
            if isinstance(event, Delta):
                chunks.append(self._chunk(event.index, {"content": event.text}, None))
            elif isinstance(event, ChoiceEnd):
                self._num_open -= 1
                self._num_output_tokens += event.num_output_tokens
                chunks.append(self._chunk(event.index, {}, event.finish_reason))
            elif isinstance(event, GenerationEnd):
                self.ended = True
                if self._nullable_usage:
                    chunks.append(self._fields | {"choices": [], "usage": _usage(event, self._num_output_tokens)})
        if not self._num_open and not self.ended:
            chunks, self._held = [], chunks
        return chunks

    def _chunk(self, index: int, delta: JSON, finish_reason: str | None) -> JSON:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._fields | {"choices": [choice]} | self._nullable_usage


def _usage(end: GenerationEnd, num_output_tokens: int) -> JSON:
    """The prompt counts once, however many choices were made of it."""
    return {
        "prompt_tokens": end.num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": end.num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": end.num_cached_tokens},
    }
