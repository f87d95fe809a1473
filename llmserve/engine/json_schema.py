"""JSON schemas as values: what they are made of, and their objects closed. Knows no library and no grammar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

JSON = Any

_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")
"""Keywords whose values are schemas, by what holds them."""

_OPEN = frozenset(("additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties"))
"""Keywords that speak of members which `properties` does not name."""

_REFERRING = frozenset(("$ref", "anyOf", "oneOf", "allOf"))
_SHAPING = _REFERRING | {"properties", "patternProperties", "additionalProperties", "required", "items", "prefixItems"}


def subschemas(schema: dict[str, JSON]) -> Iterator[tuple[str, dict[str, JSON]]]:
    """The parts of a schema that are schemas, each with the step that leads to it, as ".properties.tags"."""
    for name, value in schema.items():
        if name in _SINGLE:
            parts = [(f".{name}", value)]
        elif name in _NAMED and isinstance(value, dict):
            parts = [(f".{name}.{key}", part) for key, part in value.items()]
        elif name in _LISTED and isinstance(value, list):
            parts = [(f".{name}[{index}]", part) for index, part in enumerate(value)]
        else:
            continue
        yield from ((step, part) for step, part in parts if isinstance(part, dict))


def without_others(schema: dict[str, JSON]) -> dict[str, JSON]:
    """A schema that allows no members beside those it names, where it does not speak of others.

    Small models otherwise make members up until they are cut. All that it allows is valid by `schema` too, so one that makes a
    value of several schemas at once stays as it is: each of them would forbid what the others name. Where one of several
    objects is meant that differ in a member anyway, any of them is, which can be enforced for definitions too.
    """
    return schema if _combines(schema, schema) else _closed(schema, schema)


def _closed(schema: JSON, root: dict[str, JSON]) -> JSON:
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed_parts(name, value, root) for name, value in schema.items()}
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


def _closed_parts(name: str, value: JSON, root: dict[str, JSON]) -> JSON:
    if name in _SINGLE:
        return _closed(value, root)
    if name in _NAMED and isinstance(value, dict):
        return {key: _closed(part, root) for key, part in value.items()}
    return [_closed(part, root) for part in value] if name in _LISTED and isinstance(value, list) else value


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
