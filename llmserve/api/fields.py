"""Parsers of JSON values, made to be composed: a value and its path in, the checked value or OpenAI's words for what is wrong out.

Knows JSON and the wording of OpenAI's errors; knows no endpoint. A parser is a value that says what it takes, so what
checks a request can describe it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from llmserve.api import JSON
from llmserve.errors import InvalidParameter

TOKEN_ID = "[0-9]{1,9}"
"""A token id as the key of an object."""

_LONGEST_ECHO = 64  # characters of a client's value that an error repeats


class Parser(Protocol):
    """Checks one JSON value. Immutable: all threads share it."""

    @property
    def noun(self) -> str:
        """What it takes, as an error names it: "a string"."""
        ...

    def accepts(self, value: JSON) -> bool:
        """Whether the value's type is right."""
        ...

    def parse(self, value: JSON, path: str, ignored: list[str]) -> Any:
        """The checked value. Raises InvalidParameter; adds the paths of fields that nothing knows to `ignored`."""
        ...


class String(NamedTuple):
    """`pattern` is a regular expression of the whole."""

    min_length: int = 0
    max_length: int | None = None
    pattern: str | None = None

    @property
    def noun(self) -> str:
        return "a string"

    def accepts(self, value: JSON) -> bool:
        return isinstance(value, str)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> str:
        _check_type(self, value, path)
        _check_length(path, "a string", len(value), self.min_length, self.max_length)
        if self.pattern is not None and re.fullmatch(self.pattern, value) is None:
            what, expected = "string does not match pattern", f"a string that matches '^{self.pattern}$'"
            raise _invalid(path, "invalid_value", what, expected, f"'{_echo(value)}'")
        return str(value)


class Integer(NamedTuple):
    """Written without a fraction: 1.0 is not one, nor is true."""

    minimum: int
    maximum: int

    @property
    def noun(self) -> str:
        return "an integer"

    def accepts(self, value: JSON) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> int:
        _check_type(self, value, path)
        _check_range(path, "integer", value, self.minimum, self.maximum)
        return int(value)


class Number(NamedTuple):
    minimum: float
    maximum: float

    @property
    def noun(self) -> str:
        return "a decimal"

    def accepts(self, value: JSON) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> float:
        _check_type(self, value, path)
        _check_range(path, "decimal", value, self.minimum, self.maximum)
        return float(value)


class Boolean:
    noun = "a boolean"

    def accepts(self, value: JSON) -> bool:
        return isinstance(value, bool)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> bool:
        _check_type(self, value, path)
        return bool(value)


class OneOf(NamedTuple):
    """One of a few strings."""

    values: tuple[str, ...]

    @property
    def noun(self) -> str:
        return "a string"

    def accepts(self, value: JSON) -> bool:
        return isinstance(value, str)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> str:
        _check_type(self, value, path)
        if value not in self.values:
            raise _unknown_value(path, value, self.values)
        return str(value)


class Array(NamedTuple):
    item: Parser
    min_length: int = 0
    max_length: int | None = None

    @property
    def noun(self) -> str:
        return f"an array of {self.item.noun.partition(' ')[2]}s"

    def accepts(self, value: JSON) -> bool:
        return isinstance(value, list)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> tuple[Any, ...]:
        _check_type(self, value, path)
        _check_length(path, "an array", len(value), self.min_length, self.max_length)
        return tuple(self.item.parse(item, f"{path}[{index}]", ignored) for index, item in enumerate(value))


class Object:
    """Any object; its members are not looked at."""

    noun = "an object"

    def accepts(self, value: JSON) -> bool:
        return isinstance(value, dict)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> dict[str, JSON]:
        _check_type(self, value, path)
        return dict(value)


class Strings(NamedTuple):
    """An object whose values are strings."""

    max_properties: int
    key: String
    value: String

    @property
    def noun(self) -> str:
        return "an object"

    def accepts(self, value: JSON) -> bool:
        return isinstance(value, dict)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> dict[str, str]:
        _check_type(self, value, path)
        _check_properties(path, len(value), self.max_properties)
        return {
            self.key.parse(name, path, ignored): self.value.parse(item, f"{path}.{_echo(name)}", ignored)
            for name, item in value.items()
        }


class Biases(NamedTuple):
    """An object whose keys are token ids and whose values are numbers from -`bound` to `bound`."""

    max_properties: int
    bound: float

    @property
    def noun(self) -> str:
        return "an object"

    def accepts(self, value: JSON) -> bool:
        return isinstance(value, dict)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> tuple[tuple[int, float], ...]:
        _check_type(self, value, path)
        _check_properties(path, len(value), self.max_properties)
        number = Number(-self.bound, self.bound)
        return tuple((_token_id(key, path), number.parse(bias, f"{path}.{key}", ignored)) for key, bias in value.items())


class PromptForms(NamedTuple):
    """A prompt or several: a string, strings, token ids, or lists of those. Parsed into a tuple of strings or tuples of ids."""

    max_prompts: int
    max_id: int
    min_length: int = 0  # of each string

    @property
    def noun(self) -> str:
        return "one of a string or an array"

    def accepts(self, value: JSON) -> bool:
        return isinstance(value, str | list)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> tuple[str | tuple[int, ...], ...]:
        _check_type(self, value, path)
        text, ids = String(self.min_length), Array(Integer(0, self.max_id), 1)
        if isinstance(value, str):
            return (text.parse(value, path, ignored),)
        if value and Integer(0, 0).accepts(value[0]):
            return (ids.parse(value, path, ignored),)
        return Array(Either(text, ids), 1, self.max_prompts).parse(value, path, ignored)


class Nullable(NamedTuple):
    """Null is a value of its own here, where it otherwise is the same as a field that is not there."""

    parser: Parser

    @property
    def noun(self) -> str:
        return self.parser.noun

    def accepts(self, value: JSON) -> bool:
        return value is None or self.parser.accepts(value)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> Any:
        return None if value is None else self.parser.parse(value, path, ignored)


class Either(NamedTuple):
    """One of two types."""

    first: Parser
    second: Parser

    @property
    def noun(self) -> str:
        return f"one of {self.first.noun} or {self.second.noun.partition(' ')[2]}"

    def accepts(self, value: JSON) -> bool:
        return self.first.accepts(value) or self.second.accepts(value)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> Any:
        _check_type(self, value, path)
        return (self.first if self.first.accepts(value) else self.second).parse(value, path, ignored)


class Unsupported(NamedTuple):
    """A known parameter that cannot be honoured: only the values that ask for nothing are taken."""

    parser: Parser
    harmless: tuple[JSON, ...] = ()

    @property
    def noun(self) -> str:
        return self.parser.noun

    def accepts(self, value: JSON) -> bool:
        return self.parser.accepts(value)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> None:
        self.parser.parse(value, path, ignored)
        if value not in self.harmless:
            raise InvalidParameter(
                f"Unsupported parameter: '{path}' is not supported by this server.", param=path, code="unsupported_parameter"
            )


class Field(NamedTuple):
    """A member of a `Struct`; one without a default must be there. `passive`: it is checked, and changes nothing."""

    parser: Parser
    default: Any = ...
    passive: bool = False


class Struct:
    """An object with the members that a subclass declares as attributes, with `required` and `optional`.

    Each subclass is a parser and what it parses into: `accepts` and `parse` are the class's own. Its instances are immutable.
    """

    noun = "an object"
    declared: ClassVar[Mapping[str, Field]]

    def __init_subclass__(cls) -> None:
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Field)}
        cls.declared = {**getattr(super(cls, cls), "declared", {}), **own}
        for name, value in own.items():
            setattr(cls, name, value.default)

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and all(getattr(self, name) == getattr(other, name) for name in self.declared)

    @classmethod
    def accepts(cls, value: JSON) -> bool:
        return isinstance(value, dict)

    @classmethod
    def parse(cls, value: JSON, path: str, ignored: list[str]) -> Self:
        _check_type(cls, value, path)
        prefix = f"{path}." if path else ""
        values = {}
        for name, item in value.items():
            field = cls.declared.get(name)
            if field is None:
                if item is not None:
                    ignored.append(prefix + name)
            elif item is not None or field.parser.accepts(None):
                values[name] = field.parser.parse(item, prefix + name, ignored)
        for name, field in cls.declared.items():
            if field.default is ... and name not in values:
                raise missing(prefix + name)
        return cls(**values)


class Tagged(NamedTuple):
    """Objects of several kinds, told apart by the string in `tag`."""

    tag: str
    kinds: Mapping[str, Parser]

    @property
    def noun(self) -> str:
        return "an object"

    def accepts(self, value: JSON) -> bool:
        return isinstance(value, dict)

    def parse(self, value: JSON, path: str, ignored: list[str]) -> Any:
        _check_type(self, value, path)
        kind = value.get(self.tag)
        tag_path = f"{path}.{self.tag}" if path else self.tag
        if kind is None:
            raise missing(tag_path)
        if not isinstance(kind, str):
            raise _invalid_type(tag_path, "a string", kind)
        if kind not in self.kinds:
            raise _unknown_value(tag_path, kind, tuple(self.kinds))
        return self.kinds[kind].parse(value, path, ignored)


def required(parser: Parser) -> Any:
    """A field that must be there."""
    return Field(parser)


def optional(parser: Parser, default: Any = None) -> Any:
    """A field that may be left out or null."""
    return Field(parser, default)


def passive(parser: Parser, default: Any = None) -> Any:
    """A field that may be left out or null, and asks for nothing that this server would do otherwise."""
    return Field(parser, default, passive=True)


def missing(path: str) -> InvalidParameter:
    return InvalidParameter(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")


def _check_type(parser: Parser, value: JSON, path: str) -> None:
    if not parser.accepts(value):
        raise _invalid_type(path, parser.noun, value)


def _check_length(path: str, noun: str, length: int, minimum: int, maximum: int | None) -> None:
    kind = noun.partition(" ")[2]
    if length < minimum:
        raise _invalid(path, f"empty_{kind}", f"empty {kind}", f"{noun} with minimum length {minimum}", f"an empty {kind}")
    if maximum is not None and length > maximum:
        most, got = f"{noun} with maximum length {maximum}", f"{noun} with length {length}"
        raise _invalid(path, f"{kind}_above_max_length", f"{kind} too long", most, got)


def _check_properties(path: str, number: int, maximum: int) -> None:
    if number > maximum:
        most, got = f"an object with at most {maximum} properties", f"an object with {number} properties"
        raise _invalid(path, "object_above_max_properties", "too many properties", most, got)


def _token_id(key: str, path: str) -> int:
    if not re.fullmatch(TOKEN_ID, key):
        raise _invalid(path, "invalid_value", "invalid key", "token ids as keys", f"'{_echo(key)}'")
    return int(key)


def _check_range(path: str, kind: str, value: float, minimum: float, maximum: float) -> None:
    if value < minimum:
        code, what, expected = f"{kind}_below_min_value", f"{kind} below minimum value", f"a value >= {minimum}"
    elif value > maximum:
        code, what, expected = f"{kind}_above_max_value", f"{kind} above maximum value", f"a value <= {maximum}"
    else:
        return
    raise _invalid(path, code, what, expected, _echo(value))


def _invalid(path: str, code: str, what: str, expected: str, got: str) -> InvalidParameter:
    return InvalidParameter(f"Invalid '{path}': {what}. Expected {expected}, but got {got} instead.", param=path, code=code)


def _invalid_type(path: str, expected: str, value: JSON) -> InvalidParameter:
    message = f"Invalid type for '{path}': expected {expected}, but got {_type_name(value)} instead."
    return InvalidParameter(message, param=path, code="invalid_type")


def _unknown_value(path: str, value: str, supported: tuple[str, ...]) -> InvalidParameter:
    *rest, last = (f"'{each}'" for each in supported)
    listing = f"{', '.join(rest)}{',' * (len(rest) > 1)} and {last}" if rest else last
    message = f"Invalid value: '{_echo(value)}'. Supported values are: {listing}."
    return InvalidParameter(message, param=path, code="invalid_value")


def _echo(value: JSON) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_ECHO else f"{text[:_LONGEST_ECHO]}..."


def _type_name(value: JSON) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a decimal", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "null")
