"""The message of one choice: text and tokens in, the members of OpenAI's message out, one by one or assembled.

An answer and its stream are written by the same steps, so they say the same. Knows no events' order and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from llmserve.api import JSON
from llmserve.api.context import unique
from llmserve.engine.generation import Delta, FinishReason, TokenScore
from llmserve.engine.output_parser import CallBegin, Content, OutputParser, Part, Reasoning


class MessageDelta(NamedTuple):
    """New members of a message, or more of them; `tokens` are those of its content."""

    members: dict[str, JSON]
    tokens: tuple[TokenScore, ...] = ()


class MessageWriter:
    """Writes the message of one choice. Not thread-safe. Without a parser, all text is content.

    `legacy`: a call is written as `function_call`.
    """

    def __init__(self, parser: OutputParser | None = None, *, legacy: bool = False) -> None:
        self._parser = parser
        self._legacy = legacy
        self._tokens: tuple[TokenScore, ...] = ()  # of text that the parser holds
        # An answer that may be calls has no content until it has some.
        self._content: str | None = None if parser is not None and parser.may_call else ""

    def begin(self) -> dict[str, JSON]:
        """What a stream sends first."""
        return {"role": "assistant", "content": self._content, "refusal": None}

    def push(self, delta: Delta) -> list[MessageDelta]:
        if self._parser is None:
            return [MessageDelta({"content": delta.text}, delta.tokens)]
        self._tokens += delta.tokens
        return self._write(self._parser.push(delta.text))

    def end(self, finish_reason: str) -> tuple[list[MessageDelta], str]:
        """The last members, and OpenAI's reason why the choice ended."""
        if self._parser is None:
            return [], finish_reason
        deltas = self._write(self._parser.flush(cut=finish_reason == FinishReason.LENGTH))
        if self._content is None and not self._parser.num_calls:
            deltas.append(MessageDelta({"content": ""}))
        if self._parser.num_calls and finish_reason == FinishReason.STOP:
            finish_reason = "function_call" if self._legacy else "tool_calls"
        return deltas, finish_reason

    def _write(self, parts: Iterable[Part]) -> list[MessageDelta]:
        return [self._delta(part) for part in parts]

    def _delta(self, part: Part) -> MessageDelta:
        """The tokens that have come since the last part are this one's, as far as they can be told apart."""
        tokens, self._tokens = self._tokens, ()
        if isinstance(part, Content):
            self._content = ""
            return MessageDelta({"content": part.text}, tokens)
        if isinstance(part, Reasoning):
            return MessageDelta({"reasoning_content": part.text})
        if isinstance(part, CallBegin):
            return MessageDelta(
                self._call(part.number, {"name": part.name, "arguments": ""}, id=f"call_{unique()}", type="function")
            )
        return MessageDelta(self._call(part.number, {"arguments": part.text}))

    def _call(self, number: int, function: JSON, **more: JSON) -> dict[str, JSON]:
        if self._legacy:
            return {"function_call": function}
        return {"tool_calls": [{"index": number, **more, "function": function}]}


def assemble(deltas: Iterable[MessageDelta]) -> tuple[dict[str, JSON], list[TokenScore]]:
    """The whole message and the tokens of its content, as a client puts the deltas together."""
    text: dict[str, list[str]] = {"content": [], "reasoning_content": []}
    calls: list[dict[str, Any]] = []
    tokens: list[TokenScore] = []
    legacy: dict[str, Any] = {}
    for members, new_tokens in deltas:
        tokens += new_tokens
        for name, value in members.items():
            if name in text:
                text[name].append(value)
            elif name == "function_call":
                _extend(legacy, value)
            else:
                _extend_calls(calls, value[0])
    message: dict[str, JSON] = {"role": "assistant", "content": "".join(text["content"]), "refusal": None}
    if text["reasoning_content"]:
        message["reasoning_content"] = "".join(text["reasoning_content"])
    if calls:
        message["tool_calls"] = calls
    if legacy:
        message["function_call"] = legacy
    if (calls or legacy) and not message["content"]:
        message["content"] = None
    return message, tokens


def _extend_calls(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    if delta["index"] == len(calls):
        calls.append({"id": delta["id"], "type": delta["type"], "function": {}})
    _extend(calls[delta["index"]]["function"], delta["function"])


def _extend(function: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        function[name] = function.get(name, "") + value
