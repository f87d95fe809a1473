"""Events of a generation in, OpenAI's JSON out. Knows the wire format; knows no HTTP and no engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from llmserve.api import JSON
from llmserve.engine.generation import ChoiceEnd, Delta, Event, GenerationEnd


@dataclass(slots=True)
class Tally:
    """A generation in numbers, as far as its events have told. The prompt counts once, whatever the number of choices."""

    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_output_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)

    def add(self, event: Event) -> None:
        if isinstance(event, ChoiceEnd):
            self.num_output_tokens += event.num_output_tokens
            self.finish_reasons.append(event.finish_reason)
        elif isinstance(event, GenerationEnd):
            self.num_prompt_tokens, self.num_cached_tokens = event.num_prompt_tokens, event.num_cached_tokens

    def usage(self) -> JSON:
        prompt = self.num_prompt_tokens or 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": prompt + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


def completion(n: int, events: Iterable[Event], tally: Tally) -> dict[str, JSON]:
    """A chat completion without its head, from all events of a generation that ended well; counts them in `tally`."""
    texts: list[list[str]] = [[] for _ in range(n)]
    finish_reasons: dict[int, str] = {}
    for event in events:
        if isinstance(event, Delta):
            texts[event.choice].append(event.text)
            continue
        tally.add(event)
        if isinstance(event, ChoiceEnd):
            finish_reasons[event.choice] = event.finish_reason
    choices = [_choice(index, "".join(texts[index]), finish_reasons[index]) for index in range(n)]
    return {"choices": choices, "usage": tally.usage()}


def _choice(index: int, text: str, finish_reason: str) -> JSON:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}


class ChunkStream:
    """The chunks of a streamed chat, in the order that every client takes: the roles of all choices by index, text, each
    choice's finish reason, then, if asked for, the usage. `head` is what all of them have in common.
    """

    def __init__(self, head: dict[str, JSON], n: int, include_usage: bool) -> None:
        self.ended = False
        self.tally = Tally()
        self._head = head
        self._nullable_usage = {"usage": None} if include_usage else {}
        self._num_open = n
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
                chunks.append(self._chunk(event.choice, {"content": event.text}, None))
                continue
            self.tally.add(event)
            if isinstance(event, ChoiceEnd):
                self._num_open -= 1
                chunks.append(self._chunk(event.choice, {}, event.finish_reason))
            else:
                self.ended = True
                if self._nullable_usage:
                    chunks.append(self._head | {"choices": [], "usage": self.tally.usage()})
        if not self._num_open and not self.ended:
            chunks, self._held = [], chunks
        return chunks

    def _chunk(self, index: int, delta: JSON, finish_reason: str | None) -> JSON:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._head | {"choices": [choice]} | self._nullable_usage
