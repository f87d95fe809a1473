"""JSON schemas as values: what they are made of, their objects closed, their dates real. Knows no library and no grammar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

JSON = Any

_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "additionalItems")
"""Keywords whose values are schemas, by what holds them. `items` was a list too, up to draft 2019-09."""

_OPEN = frozenset(("additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties"))
"""Keywords that speak of members which `properties` does not name."""

_REFERRING = frozenset(("$ref", "anyOf", "oneOf", "allOf"))
_SHAPING = _REFERRING | {"properties", "patternProperties", "additionalProperties", "required", "items", "prefixItems"}

_LEAP = "(?:0[48]|[2468][048]|[13579][26])"  # 04 to 96, of a year's last two digits or, before 00, of its first two
_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_DAY = "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"  # of any year
_DATE = f"(?:{_YEAR}-{_DAY}|(?:[0-9]{{2}}{_LEAP}|{_LEAP}00)-02-29)"
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](?:\.[0-9]+)?(?:[zZ]|[+-]{_HOUR})"
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[tT]{_TIME}$"}
"""By format: RFC 3339 from year 1 on, in either case as there, without leap seconds, which most readers refuse."""


def subschemas(schema: dict[str, JSON]) -> Iterator[tuple[str, dict[str, JSON]]]:
    """The parts of a schema that are schemas, each with the step that leads to it, as ".properties.tags"."""
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, dict):
            parts = [(f".{name}.{key}", part) for key, part in value.items()]
        elif name in _LISTED and isinstance(value, list):
            parts = [(f".{name}[{index}]", part) for index, part in enumerate(value)]
        elif name in _SINGLE:
            parts = [(f".{name}", value)]
        else:
            continue
        yield from ((step, part) for step, part in parts if isinstance(part, dict))


def without_others(schema: dict[str, JSON]) -> dict[str, JSON]:
    """A schema that allows no members beside those it names, where it does not speak of others.

    Small models otherwise make members up until they are cut. All that it allows is valid by `schema` too, so one that makes a
    value of several schemas at once stays as it is: each of them would forbid what the others name. Where one of several
    objects is meant that differ in a member anyway, any of them is, which can be enforced for definitions too.
    """
    if _combines(schema, schema):
        return schema
    closed: dict[str, JSON] = _rebuilt(schema, lambda part: _closed(part, schema))
    return closed


def with_real_dates(schema: JSON) -> JSON:
    """A schema with patterns in the place of the formats "date", "time" and "date-time", where a string has no pattern of its own.

    Who knows the formats only by their shape allows 29 February in any year.
    """
    return _rebuilt(schema, _dated)


def _rebuilt(schema: JSON, change: Callable[[dict[str, JSON]], dict[str, JSON]]) -> JSON:
    """What `change` makes of a schema, after it was made to each of its parts that are schemas."""
    if not isinstance(schema, dict):
        return schema
    return change({name: _rebuilt_parts(name, value, change) for name, value in schema.items()})


def _rebuilt_parts(name: str, value: JSON, change: Callable[[dict[str, JSON]], dict[str, JSON]]) -> JSON:
    if name in _NAMED and isinstance(value, dict):
        return {key: _rebuilt(part, change) for key, part in value.items()}
    if name in _LISTED and isinstance(value, list):
        return [_rebuilt(part, change) for part in value]
    return _rebuilt(value, change) if name in _SINGLE else value


def _closed(schema: dict[str, JSON], root: dict[str, JSON]) -> dict[str, JSON]:
    closed = dict(schema)
    named = _table(schema, "properties")
    required = map(str, _list(schema, "required"))
    if isinstance(schema.get("properties"), dict) and _OPEN.isdisjoint(schema) and all(name in named for name in required):
        closed["additionalProperties"] = False
    objects = _objects(schema.get("oneOf"), root)
    if (
        objects
        and len(objects) == len(schema["oneOf"])
        and _differ(objects)
        and all(each.get("type") == "object" for each in objects)
    ):
        closed["anyOf"] = closed.pop("oneOf")
    return closed


def _dated(schema: dict[str, JSON]) -> dict[str, JSON]:
    pattern = _PATTERNS.get(str(schema.get("format")))
    if pattern is None or "pattern" in schema:
        return schema
    return {name: value for name, value in schema.items() if name != "format"} | {"pattern": pattern}


def _combines(schema: dict[str, JSON], root: dict[str, JSON]) -> bool:
    """Whether some value has to be valid by several of the schemas in it, or by only one of some that are not told apart."""
    shaping = _SHAPING.intersection(schema)
    if len(shaping) > 1 and not shaping.isdisjoint(_REFERRING):
        return True
    if len(_list(schema, "allOf")) > 1 or not _differ(_objects(schema.get("oneOf"), root)):
        return True
    return any(_combines(part, root) for _, part in subschemas(schema))


def _objects(schemas: JSON, root: dict[str, JSON]) -> list[dict[str, JSON]]:
    """Those of the schemas, perhaps by reference, that allow objects."""
    resolved = [_resolve(each, root) for each in schemas] if isinstance(schemas, list) else []
    return [each for each in resolved if "object" in str(each.get("type", "object"))]


def _differ(objects: list[dict[str, JSON]]) -> bool:
    """Whether each two have different values in some member that all must have, so that none is valid by both."""
    kinds = [_constants(each) for each in objects]
    return len(kinds) < 2 or any(len({kind[name] for kind in kinds if name in kind}) == len(kinds) for name in kinds[0])


def _resolve(schema: JSON, root: dict[str, JSON]) -> dict[str, JSON]:
    """The definition that a schema refers to, or itself; {} for what is no schema."""
    reference = str(schema.get("$ref", "")) if isinstance(schema, dict) else ""
    place, _, name = reference.removeprefix("#/").partition("/")
    definition = _table(root, place).get(name, schema) if place in ("$defs", "definitions") else schema
    return definition if isinstance(definition, dict) else {}


def _constants(schema: dict[str, JSON]) -> dict[str, str]:
    """The members that an object of this schema must have, and that have one value only, which is a string."""
    constants = {}
    for name in _list(schema, "required"):
        value = _table(_table(schema, "properties"), str(name))
        options = [value["const"]] if "const" in value else _list(value, "enum")
        if len(options) == 1 and isinstance(options[0], str):
            constants[str(name)] = options[0]
    return constants


# What a client sent as a schema may hold anything; who compiles it says what is wrong.


def _list(schema: dict[str, JSON], name: str) -> list[JSON]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def _table(schema: dict[str, JSON], name: str) -> dict[str, JSON]:
    value = schema.get(name)
    return value if isinstance(value, dict) else {}
