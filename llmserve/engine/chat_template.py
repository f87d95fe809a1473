"""Chat messages in, prompt segments out: which of the prompt's text is a control token of the template, and which is only text.

Renders a model's Jinja template in a sandbox. Knows nothing of token ids, and is the only file that imports jinja2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmserve.engine import tool_prompts
from llmserve.engine.tool_prompts import ToolSupport
from llmserve.errors import ModelFileError, TemplateError

JSON = Any

MAX_CHARACTERS = 16 * 1024**2
"""Longest prompt a template may make: far beyond any context, and twice the largest request body by default."""

_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Unicode's noncharacters, meant for internal use: no case, no white space, untouched by the templates' filters."""


@dataclass(frozen=True, slots=True)
class Text:
    """Prompt text, tokenized as ordinary text whatever it looks like."""

    text: str


@dataclass(frozen=True, slots=True)
class Control:
    """One control token, named by its text."""

    text: str


Segment = Text | Control


def _join_segments(first: Sequence[Segment], second: Sequence[Segment]) -> tuple[Segment, ...]:
    """One prompt of two parts, no two texts in a row."""
    if first and second and isinstance(first[-1], Text) and isinstance(second[0], Text):
        return (*first[:-1], Text(first[-1].text + second[0].text), *second[1:])
    return (*first, *second)


class ChatTemplate:
    """A model's chat template, compiled once. Thread-safe.

    **Text that comes in with the messages never becomes a control token.** Before rendering, every string of the messages
    and variables (keys too, roles not: the caller checks those) that holds a control token's text, or begins or ends with
    a part of one, gets a mark there: a character that occurs nowhere else. What still reads as a control token afterwards
    was written by the template; then the marks are taken out again. Strings without such parts are left as they are.

    That holds for templates that slice, split, strip or JSON-encode strings, and join whole ones. Not covered: those that
    make a control token's text out of others, by changing characters (`lower`, `replace`, `striptags`), by joining parts
    of two strings, or by writing both ends of one around a string. A template that looks for a control token's text in a
    message does not find it.

    The output is bounded, time is not: a template is part of the model that the operator chose.
    """

    def __init__(
        self,
        source: str | None,
        control_texts: Collection[str] = (),
        special: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`source` None is a model without a template; `special` are the texts known to it as bos_token, eos_token, ….

        Raises ModelFileError when the template cannot be compiled.
        """
        self._template = None if source is None else _compile(source, special)
        self._guard = _Guard(control_texts, source or "")
        self.tools = ToolSupport() if source is None else tool_prompts.probe(source, self._render_text)

    def render(
        self, messages: Sequence[Mapping[str, JSON]], *, add_generation_prompt: bool = True, **variables: JSON
    ) -> tuple[Segment, ...]:
        """The prompt for `messages`, no segment empty and no two texts in a row. Raises TemplateError."""
        if self._template is None:
            raise TemplateError("This model has no chat template; set `chat_template` in its configuration.")
        mark = ""
        try:
            mark = self._guard.choose_mark([messages, variables])
            if mark:
                messages, variables = self._guard.mark_messages(messages, mark), self._guard.mark(variables, mark)
            pieces = self._template.generate(variables, messages=messages, add_generation_prompt=add_generation_prompt)
            return self._guard.split(_join(pieces), mark)
        except _Refused as error:
            raise TemplateError(_without(mark, str(error))) from None
        except Exception as error:  # templates can raise anything: TypeError, UndefinedError, SecurityError, RecursionError
            reason = _without(mark, str(error) or type(error).__name__)
            raise TemplateError(f"The chat template failed: {reason.rstrip('.')}.") from error

    def extend(self, segments: Sequence[Segment], text: str) -> tuple[Segment, ...]:
        """A prompt that goes on with a text as if the template had written it."""
        return _join_segments(segments, self._guard.split(text, ""))

    def _render_text(self, messages: Sequence[Mapping[str, JSON]], **variables: JSON) -> str:
        return "".join(segment.text for segment in self.render(messages, **variables))


class Literals:
    """A set of texts to look for, the longest first. Thread-safe.

    The texts share their prefixes in one regular expression, so that a character costs the length of a text at most: a
    plain alternation would be tried text by text at each "<" that a client sends.
    """

    def __init__(self, texts: Collection[str]) -> None:
        pattern = _trie([text for text in texts if text])
        self._text = re.compile(f"({pattern})")
        self._start = re.compile(f"(?={pattern})")

    def split(self, text: str) -> list[str]:
        """`text` in parts: those with an odd index are the texts found, from left to right without overlap."""
        return self._text.split(text)

    def starts(self, text: str) -> list[int]:
        """Every index where one of the texts begins; they may overlap."""
        if self._text.search(text) is None:
            return []
        return [match.start() for match in self._start.finditer(text)]


def _trie(texts: Sequence[str]) -> str:
    """A regular expression for the longest of `texts`, or for nothing."""
    branches: dict[str, list[str]] = {}
    for text in texts:
        if text:
            branches.setdefault(text[0], []).append(text[1:])
    if not branches:
        return "" if texts else "(?!)"
    pattern = "|".join(re.escape(character) + _trie(rest) for character, rest in branches.items())
    if "" in texts:
        return f"(?:{pattern})?"
    return pattern if len(branches) == 1 else f"(?:{pattern})"


class _Guard:
    """Breaks control tokens' texts in strings with a mark, and finds those that are left in rendered text.

    Control tokens of one character, or with white space at an end, cannot be broken and are taken for text everywhere.
    """

    def __init__(self, control_texts: Collection[str], source: str) -> None:
        texts = [text for text in control_texts if len(text) > 1 and text == text.strip()]
        self._source = source
        self._controls = Literals(texts)
        self._longest = max(map(len, texts), default=0)
        self._endings = _Prefixes({text[cut:] for text in texts for cut in range(1, len(text))})
        self._reversed_beginnings = _Prefixes({text[:cut][::-1] for text in texts for cut in range(1, len(text))})

    def choose_mark(self, value: JSON) -> str:
        """A character that no string of `value` holds; "" when no string needs one."""
        strings = list(_strings(value))
        if not any(map(self._breaks, strings)):
            return ""
        strings.append(self._source)
        for mark in _MARKS:
            if not any(mark in string or _escaped(mark) in string for string in strings):
                return mark
        raise _Refused("The messages hold every Unicode noncharacter from U+FDD0 to U+FDEF: one must be left.")

    def mark_messages(self, messages: Sequence[Mapping[str, JSON]], mark: str) -> list[dict[str, JSON]]:
        return [self.mark(message, mark) | ({"role": message["role"]} if "role" in message else {}) for message in messages]

    def mark(self, value: JSON, mark: str) -> JSON:
        return _map_strings(value, lambda string: _insert(mark, string, self._breaks(string)))

    def split(self, text: str, mark: str) -> tuple[Segment, ...]:
        parts = [_without(mark, part) for part in self._controls.split(text)]
        return tuple(Control(part) if index % 2 else Text(part) for index, part in enumerate(parts) if part)

    def _breaks(self, string: str) -> list[int]:
        """Where a mark keeps `string` from holding a control token's text, or completing one with what stands beside it.

        White space at the ends stays outside of the marks, where templates strip it.
        """
        breaks = {start + 1 for start in self._controls.starts(string)}
        begin, end = len(string) - len(string.lstrip()), len(string.rstrip())
        if self._endings.match(string[begin : begin + self._longest]):
            breaks.add(begin)
        if self._reversed_beginnings.match(string[max(end - self._longest, 0) : end][::-1]):
            breaks.add(end)
        return sorted(breaks)


class _Prefixes:
    """Texts that a string may begin with. For nearly every string, two characters tell that it does not."""

    def __init__(self, texts: Collection[str]) -> None:
        self._texts = frozenset(texts)
        self._starts = {text[:2] for text in texts}

    def match(self, string: str) -> bool:
        if string[:1] not in self._texts and string[:2] not in self._starts:
            return False
        return any(string[:length] in self._texts for length in range(1, len(string) + 1))


def _strings(value: JSON) -> Iterator[str]:
    """Every string of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
        yield from _strings(list(value.values()))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _map_strings(value: JSON, change: Callable[[str], str]) -> JSON:
    """A copy of a JSON value with every string changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(item, change) for item in value]
    return value


def _insert(mark: str, string: str, indices: Sequence[int]) -> str:
    return mark.join(string[begin:end] for begin, end in pairwise([0, *indices, len(string)]))


def _without(mark: str, text: str) -> str:
    """`text` as it would be had nothing been marked, also where the template wrote JSON in ASCII."""
    return text.replace(mark, "").replace(_escaped(mark), "")


def _escaped(mark: str) -> str:
    return json.dumps(mark)[1:-1]


class _Refused(Exception):
    """A message for the client: the template's own, or of the bounds around it."""


def _join(pieces: Iterator[str]) -> str:
    """The rendered text, as long as it stays bounded: a template that runs away is stopped."""
    rendered = []
    room = MAX_CHARACTERS
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            raise _Refused(f"The chat template makes a prompt of more than {MAX_CHARACTERS} characters.")
        rendered.append(piece)
    return "".join(rendered)


def _compile(source: str, special: Mapping[str, str]) -> jinja2.Template:
    """With the settings, names and filters that chat templates are written for: those of Hugging Face's transformers."""
    extensions = ["jinja2.ext.loopcontrols", _GenerationBlock]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals.update(special, raise_exception=_raise_exception, strftime_now=_strftime_now)
    environment.filters["tojson"] = _tojson
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelFileError(f"The chat template has an error in line {error.lineno}: {error.message}.") from error
    except Exception as error:  # what Jinja makes of it can be too deep, or too large, for Python's own compiler
        raise ModelFileError(f"The chat template cannot be compiled: {error}.") from error


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`, by which templates show trainers the model's own words. Here it is no more
    than what it holds."""

    tags = {"generation"}  # noqa: RUF012 (declared so in the base class)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: JSON,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML, which has no place in a prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
