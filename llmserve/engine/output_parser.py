"""What a model's text means: content, reasoning and tool calls. Text in pieces in, parts out.

However the text is cut into pieces, the parts say the same; a part comes as soon as it is certain. What only resembles a call is
content: a call begins when its name is one of the functions' and its arguments begin. Knows nothing of tokens or HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from llmserve.engine.tool_formats import CALL_MARKERS, FORMATS, HERMES, LLAMA_3, MISTRAL

JSON = Any

THINK, END_THINK = "<think>", "</think>"
MARKERS = frozenset((THINK, END_THINK, *CALL_MARKERS))
"""What blocks and calls are recognised by. Models may have control tokens for these."""


class Content(NamedTuple):
    text: str


class Reasoning(NamedTuple):
    text: str


class CallBegin(NamedTuple):
    """Call `number` of the answer, counted from 0."""

    number: int
    name: str


class CallArguments(NamedTuple):
    """The next piece of a call's arguments, which together are the JSON that the model wrote."""

    number: int
    text: str


_FORCED = HERMES._replace(bare=True, separator=";")
_OPENERS = {form.opener: form for form in FORMATS}
_OPENER = re.compile("|".join(map(re.escape, _OPENERS)))

Part = Content | Reasoning | CallBegin | CallArguments


class OutputParser:
    """Parses one choice. Not thread-safe.

    A call is recognised in any of the formats, for models write others' too. Without `functions` there are none; beyond
    `max_calls`, they are left out. `reasoning`: whether the text may begin with a `<think>` block. White space between blocks
    and calls belongs to none of them, and is dropped. `forced`: the prompt has the opener of the first call already.
    """

    def __init__(
        self,
        functions: Collection[str] = (),
        *,
        reasoning: bool = False,
        forced: bool = False,
        max_calls: int | None = None,
    ) -> None:
        self.num_calls = 0
        self._functions = frozenset(functions)
        self._max_calls = max_calls
        self._buffer = ""
        self._parts: list[Part] = []
        self._drops_space = False  # behind a block or call, until there is text again
        self._final = self._cut = False
        self._form = LLAMA_3  # of the call being read, or that may begin
        self._in_object = False  # whether its arguments are a member of its object
        self._extent = _Extent()
        self._step: Callable[[], bool] = self._reasoning_or_answer if reasoning else self._answer
        if forced:
            self._step = self._forced_answer

    @property
    def may_call(self) -> bool:
        return bool(self._functions)

    def push(self, text: str) -> list[Part]:
        """The parts that are certain with `text`."""
        self._buffer += text
        return self._advance()

    def flush(self, *, cut: bool = False) -> list[Part]:
        """What was held: no more text comes. Of a text that was `cut` at its longest, the beginning of a call is no content."""
        self._final, self._cut = True, cut
        return self._advance()

    def _advance(self) -> list[Part]:
        while self._step():
            pass
        parts, self._parts = self._parts, []
        return parts

    # A step takes what it is certain of from the buffer. True: another step may go on; False: more text is needed.

    def _reasoning_or_answer(self) -> bool:
        text = self._buffer.lstrip()
        if not self._final and THINK.startswith(text):
            return False
        if text.startswith(THINK):
            self._buffer = text.removeprefix(THINK)
            return self._go(self._reasoning_start)
        return self._go(self._answer)

    def _reasoning_start(self) -> bool:
        self._buffer = self._buffer.lstrip()
        return self._go(self._reasoning) if self._buffer or self._final else False

    def _reasoning(self) -> bool:
        before, end, after = self._buffer.partition(END_THINK)
        if end:
            self._emit(Reasoning, before.rstrip())
            self._buffer, self._drops_space = after, True
            return self._go(self._answer)
        self._emit_certain(Reasoning, (END_THINK,))
        return False

    def _answer(self) -> bool:
        """The beginning of what is not reasoning."""
        text = self._buffer.lstrip()
        if not text and not self._final:
            return False
        if text.startswith("{") and self._functions:
            self._form = LLAMA_3
            return self._go(self._bare_call)
        return self._go(self._content)

    def _forced_answer(self) -> bool:
        text = self._buffer.lstrip()
        if not text and not self._final:
            return False
        self._form = MISTRAL if text.startswith("[") else _FORCED
        return self._go(self._bare_call)

    def _content(self) -> bool:
        if self._drops_space:
            self._buffer = self._buffer.lstrip()
        if not self._functions:
            self._emit(Content, self._buffer)
            self._buffer = ""
            return False
        opener = _OPENER.search(self._buffer)
        if opener is None:
            self._emit_certain(Content, _OPENERS)
            return False
        before = self._buffer[: opener.start()].rstrip()
        self._emit(Content, before)
        self._buffer = self._buffer[len(before) :]
        self._form = _OPENERS[opener[0]]
        return self._go(self._opened)

    def _opened(self) -> bool:
        return self._head(skip=self._buffer.index(self._form.opener) + len(self._form.opener))

    def _bare_call(self) -> bool:
        return self._head(skip=0)

    def _next_call(self) -> bool:
        """Behind a separator, which is the buffer's first character."""
        return self._head(skip=1)

    def _head(self, skip: int) -> bool:
        """A call's beginning, behind `skip` characters that are content if it is none."""
        heads = _OBJECT_HEADS + _NAME_HEADS if self._form.array else _OBJECT_HEADS
        for head in heads:
            if (match := head.full.match(self._buffer, skip)) is not None:
                if match["name"] not in self._functions:
                    return self._no_call(skip)
                self._buffer = self._buffer[match.end() :]
                self._in_object = head.in_object
                return self._begin_call(match["name"])
        if any(head.partial.fullmatch(self._buffer, skip) for head in heads):
            return self._undecided(skip)
        return self._whole_object(skip)

    def _whole_object(self, skip: int) -> bool:
        """A call whose members are in another order: it is only understood when it is complete."""
        start = next((match for head in _OBJECTS if (match := head.full.match(self._buffer, skip))), None)
        if start is None:
            may_begin = any(head.partial.fullmatch(self._buffer, skip) for head in _OBJECTS)
            return self._undecided(skip) if may_begin else self._no_call(skip)
        begin = start.start("object")
        end = self._extent.find(self._buffer, begin)
        if end is None:
            return self._undecided(skip)
        self._extent = _Extent()
        name, arguments = _read_call(self._buffer[begin:end])
        if name not in self._functions:
            return self._no_call(skip)
        self._buffer = self._buffer[end:]
        self._begin_call(name)
        self._emit_arguments(arguments)
        return self._go(self._after_call)

    def _undecided(self, skip: int) -> bool:
        """More text is needed to tell a call."""
        if not self._final:
            return False
        if self._cut and skip:
            self._buffer = ""
        return self._no_call(skip)

    def _no_call(self, skip: int) -> bool:
        self._extent = _Extent()
        self._emit(Content, self._buffer[:skip])
        self._buffer = self._buffer[skip:]
        return self._go(self._content)

    def _begin_call(self, name: str) -> bool:
        self.num_calls += 1
        if not self._surplus:
            self._parts.append(CallBegin(self.num_calls - 1, name))
        return self._go(self._arguments)

    def _arguments(self) -> bool:
        end = self._extent.find(self._buffer, 0)
        if end is None:
            certain = len(self._buffer) if self._final else self._extent.take()
            self._emit_arguments(self._buffer[:certain])
            self._buffer = self._buffer[certain:]
            return False
        self._extent = _Extent()
        self._emit_arguments(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return self._go(self._rest_of_object if self._in_object else self._after_call)

    def _rest_of_object(self) -> bool:
        """Behind the arguments: the brace that ends the call, perhaps after other members. Some models forget it."""
        text = self._buffer.lstrip()
        if not text:
            return False
        self._buffer = text
        if text[0] == ",":
            self._extent = _Extent(depth=1)
            return self._go(self._other_members)
        if text[0] == "}":
            self._buffer = text[1:]
        return self._go(self._after_call)

    def _other_members(self) -> bool:
        end = self._extent.find(self._buffer, 0)
        if end is None:
            return False
        self._extent = _Extent()
        self._buffer = self._buffer[end:]
        return self._go(self._after_call)

    def _after_call(self) -> bool:
        form = self._form
        self._drops_space = True
        text = self._buffer = self._buffer.lstrip()
        if not text:
            return False
        if form.closer and form.closer.startswith(text[: len(form.closer)]):
            if len(text) < len(form.closer):
                return False
            self._buffer = text.removeprefix(form.closer)
            return self._go(self._content)
        if form.array and text[0] == "]":
            self._buffer = text[1:]
            return self._go(self._content)
        if text[0] == ("," if form.array else form.separator):
            return self._go(self._next_call)
        return self._go(self._bare_call if form.bare and text[0] == "{" else self._content)

    # What is emitted.

    @property
    def _surplus(self) -> bool:
        return self._max_calls is not None and self.num_calls > self._max_calls

    def _emit(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        if text:
            self._drops_space = False
            self._parts.append(kind(text))

    def _emit_arguments(self, text: str) -> None:
        if text and not self._surplus:
            self._parts.append(CallArguments(self.num_calls - 1, text))

    def _emit_certain(self, kind: type[Content] | type[Reasoning], markers: Iterable[str]) -> None:
        """All but what may be the space before one of `markers`, and its beginning: that has its first character only there."""
        text = self._buffer
        start = len(text)
        if not self._final:
            last = max(text.rfind("<"), text.rfind("["))
            if last >= 0 and any(marker.startswith(text[last:]) for marker in markers):
                start = last
            start = len(text[:start].rstrip())
        self._emit(kind, text[:start])
        self._buffer = text[start:]

    def _go(self, step: Callable[[], bool]) -> bool:
        self._step = step
        return True


class _Extent:
    """Where a JSON value ends: an object or array, from its first bracket on, or from within with a `depth` to begin with.

    It goes on where it stopped when it is asked again with more text. Looks at brackets and strings only.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._position: int | None = None

    def find(self, text: str, start: int) -> int | None:
        """The index behind the value that begins at `start`; None if that is not in `text` yet."""
        position = start if self._position is None else self._position
        while (match := self._next(text, position)) is not None:
            position = match.end()
            character = match[0][-1]
            if character == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if character in "{[" else -1
                if self._depth <= 0:
                    return position
        # An escape is looked at again when it is whole.
        self._position = len(text) - (_open_escape(text, position) if self._in_string else 0)
        return None

    def _next(self, text: str, position: int) -> re.Match[str] | None:
        return _STRING_END.match(text, position) if self._in_string else _BRACKET.search(text, position)

    def take(self) -> int:
        """How much of the text has been read, which the caller takes away."""
        num_read, self._position = self._position or 0, 0
        return num_read


_BRACKET = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def _open_escape(text: str, position: int) -> int:
    """1 when `text` ends within an escape: in an odd number of backslashes."""
    return (len(text) - len(text[position:].rstrip("\\")) - position) % 2


class _Head(NamedTuple):
    """The beginning of a call up to its arguments, and what may still become one. `in_object`: the call is a JSON object."""

    full: re.Pattern[str]
    partial: re.Pattern[str]
    in_object: bool


def _head(*atoms: str, in_object: bool = True) -> _Head:
    """Of atoms each of which is one character or a repeated one, so that every prefix is a prefix of the sequence."""
    partial = ""
    for atom in reversed(atoms):
        partial = f"(?:{atom}{partial})?"
    return _Head(re.compile("".join(atoms)), re.compile(re.sub(r"\?P<\w+>", "?:", partial)), in_object)


_SPACE = r"\s*"
_NAME = r"(?P<name>[\w.:-]+)"
_OBJECT = [_SPACE, r"\[?", _SPACE, r"(?P<object>\{)", _SPACE]
_VALUE = r"(?=\{)"


def _literal(text: str) -> list[str]:
    return [re.escape(character) for character in text]


_COLON = ['"', _SPACE, ":", _SPACE]
_OBJECT_HEADS = [
    _head(*_OBJECT, *_literal('"name'), *_COLON, '"', _NAME, '"', _SPACE, ",", _SPACE, *_literal(f'"{key}'), *_COLON, _VALUE)
    for key in ("arguments", "parameters")
]
_NAME_HEADS = [
    _head(_SPACE, _NAME, *middle, _SPACE, _VALUE, in_object=False)
    for middle in ([], _literal("[ARGS]"), [*_literal("[CALL_ID]"), r"\w+", *_literal("[ARGS]")])
]
_OBJECTS = [_head(*_OBJECT, *_literal(f'"{key}"')) for key in ("name", "arguments", "parameters", "type", "id", "function")]
"""Other beginnings of objects that may be calls."""


def _read_call(text: str) -> tuple[str, str]:
    """Name and arguments of a call that is written as a JSON object; no name if it is none."""
    try:
        call = json.loads(text, strict=False)
    except ValueError:
        return "", ""
    if isinstance(call.get("function"), dict):
        call = call["function"]
    name = call.get("name") or call.get("function")
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return "", ""
    if not isinstance(name, str) or not isinstance(arguments, dict | None):
        return "", ""
    return name, json.dumps(arguments or {}, ensure_ascii=False)
