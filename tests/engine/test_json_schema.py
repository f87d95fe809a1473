"""Objects that are closed, and those that must not be; dates that are real."""

import json

import jsonschema
import pytest

from llmserve.engine.constraint import Constraints
from llmserve.engine.generation import Grammar
from llmserve.engine.json_schema import subschemas, with_real_dates, without_others
from tests.fakes import byte_tokenizer
from tests.grammars import accepts

A = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED = {"type": "object", "properties": {"kind": {"const": "named"}, "name": {}}, "required": ["kind", "name"]}
OTHER = {"type": "object", "properties": {"kind": {"enum": ["other"]}, "size": {}}, "required": ["kind"]}


def allows(schema, value):
    return jsonschema.Draft202012Validator(without_others(schema)).is_valid(value)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (A, {"b": 1}),
        ({"properties": {"x": A}}, {"x": {"b": 1}}),
        ({"items": A}, [{"b": 1}]),
        ({"prefixItems": [A]}, [{"b": 1}]),
        ({"additionalProperties": A}, {"x": {"b": 1}}),
        ({"anyOf": [A, {"type": "null"}], "description": "either"}, {"b": 1}),
        ({"$defs": {"a": A}, "$ref": "#/$defs/a"}, {"b": 1}),
        ({"allOf": [A]}, {"b": 1}),
        (
            {"$defs": {"n": NAMED, "o": OTHER}, "oneOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/o"}]},
            {"kind": "other", "b": 1},
        ),
        ({"oneOf": [A, {"type": "string"}]}, {"b": 1}),
        ({"properties": {"properties": A}}, {"properties": {"b": 1}}),
    ],
)
def test_members_that_a_schema_does_not_name_are_left_out(schema, value):
    assert jsonschema.Draft202012Validator(schema).is_valid(value)
    assert not allows(schema, value)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "object"}, {"b": 1}),
        (A | {"additionalProperties": True}, {"b": 1}),
        (A | {"additionalProperties": {"type": "integer"}}, {"b": 1}),
        (A | {"patternProperties": {"^b": {}}}, {"b": 1}),
        (A | {"minProperties": 2}, {"a": 1, "b": 1}),
        (A | {"required": ["b"]}, {"b": 1}),
        ({"allOf": [A, {"properties": {"b": {}}}]}, {"a": 1, "b": 1}),
        ({"$defs": {"a": A}, "$ref": "#/$defs/a", "properties": {"b": {}}}, {"a": 1, "b": 1}),
        (A | {"anyOf": [{"required": ["b"]}, {"required": ["c"]}]}, {"b": 1}),
        ({"oneOf": [A, NAMED]}, {"kind": "named", "name": 1, "a": "no integer"}),
    ],
)
def test_what_speaks_of_others_or_combines_schemas_is_left_as_it_is(schema, value):
    assert without_others(schema) == schema
    assert allows(schema, value)


def test_one_of_several_objects_is_any_of_them_where_they_differ_in_a_member():
    definitions = {"n": NAMED, "o": OTHER}
    schema = {"$defs": definitions, "items": {"oneOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/o"}]}}
    assert without_others(schema)["items"] == {"anyOf": schema["items"]["oneOf"]}
    numbers = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    assert without_others(numbers) == numbers


def test_what_came_in_is_left_as_it_is():
    before = repr(NAMED)
    without_others(NAMED)
    assert repr(NAMED) == before


def test_the_parts_of_a_schema_come_with_their_places():
    schema = {"properties": {"x": A, "y": True}, "anyOf": [NAMED, False], "items": OTHER, "enum": [{"type": "no schema"}]}
    assert [step for step, _ in subschemas(schema)] == [".properties.x", ".anyOf[0]", ".items"]
    assert [step for step, _ in subschemas({"items": [True, A]})] == [".items[1]"]


@pytest.mark.parametrize(
    "nonsense", [5, None, "x", [[]], {"a": 5}, [{"$ref": 7}, {"type": 3}, {"required": [[]], "properties": 1}]]
)
@pytest.mark.parametrize(
    "keyword", ["properties", "required", "allOf", "oneOf", "anyOf", "$defs", "items", "$ref", "type", "format"]
)
def test_nonsense_is_left_to_who_compiles_it(keyword, nonsense):
    assert without_others({"properties": {}, keyword: nonsense})
    assert without_others({keyword: nonsense})
    assert with_real_dates({keyword: nonsense}) == {keyword: nonsense}


DATE = {"type": "string", "format": "date"}
DATES = [
    "2024-02-29",
    "2000-02-29",
    "0004-02-29",
    "9996-02-29",
    "2023-02-28",
    "2023-04-30",
    "2023-12-31",
    "0001-01-01",
    "9999-12-31",
]
NO_DATES = ["2023-02-29", "1900-02-29", "0000-02-29", "9382-02-29", "2024-02-30", "2023-04-31", "2023-06-31", "2023-09-31", "2023-11-31",
            "2023-01-32", "2023-01-00", "2023-00-01", "2023-13-01", "0000-01-01", "2023-1-1", "23-01-01", "12023-01-01", "2023-01-01 "]  # fmt: skip
TIMES = ["00:00:00Z", "23:59:59Z", "09:26:59z", "09:26:59.5Z", "09:26:59.123456789+00:00", "09:26:59-23:59"]
NO_TIMES = ["23:59:60Z", "09:26:60Z", "09:26:59", "24:00:00Z", "09:60:00Z", "09:26Z", "09:26:59.Z", "09:26:59+24:00", "09:26:59+01", "9:26:59Z"]  # fmt: skip
MOMENTS = ["2024-02-29T09:26:59Z", "2000-02-29t23:59:59.25-08:00"]
NO_MOMENTS = [
    "9382-02-29T11:51:60z",
    "2023-02-29T09:26:59Z",
    "2024-02-29T23:59:60Z",
    "2024-02-29T09:26:59",
    "2024-02-29 09:26:59Z",
    "2024-02-29",
]
LENGTHS = [{}, {"minLength": 1}, {"maxLength": 40}, {"minLength": 2, "maxLength": 40}]


@pytest.fixture(scope="module")
def constraints():
    return Constraints(byte_tokenizer())


def allowed(constraints, schema, value):
    return accepts(constraints, Grammar("json_schema", json.dumps(schema)), json.dumps(value))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    ("form", "real", "unreal"), [("date", DATES, NO_DATES), ("time", TIMES, NO_TIMES), ("date-time", MOMENTS, NO_MOMENTS)]
)
def test_days_and_seconds_that_there_are_can_be_written_and_no_others(constraints, form, real, unreal, lengths):
    schema = {"type": "string", "format": form, **lengths}
    assert [text for text in real + unreal if allowed(constraints, schema, text)] == real


def test_a_date_is_as_long_as_its_schema_says(constraints):
    schema = {"type": "string", "format": "date-time", "minLength": 21, "maxLength": 22}
    texts = [f"2024-02-29T09:26:59{fraction}Z" for fraction in ("", ".1", ".12", ".123")]
    assert [allowed(constraints, schema, text) for text in texts] == [False, True, False, False]


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "properties": {"x": DATE}, "required": ["x"]}, lambda day: {"x": day}),
        ({"type": "object", "properties": {"format": DATE}, "required": ["format"]}, lambda day: {"format": day}),
        ({"type": "object", "additionalProperties": DATE}, lambda day: {"x": day}),
        ({"type": "object", "patternProperties": {"^x$": DATE}}, lambda day: {"x": day}),
        ({"type": "array", "items": DATE}, lambda day: [day]),
        ({"type": "array", "prefixItems": [DATE]}, lambda day: [day]),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [DATE]}, lambda day: [day]),
        ({"anyOf": [DATE, {"type": "null"}]}, lambda day: day),
        ({"oneOf": [DATE, {"type": "null"}]}, lambda day: day),
        ({"allOf": [DATE]}, lambda day: day),
        ({"$ref": "#/$defs/day", "$defs": {"day": DATE}}, lambda day: day),
        ({"$ref": "#/definitions/days", "definitions": {"days": {"type": "array", "items": DATE}}}, lambda day: [day]),
        ({"type": ["string", "null"], "format": "date"}, lambda day: day),
        ({"type": "string", "format": "date", "enum": ["2024-02-29", "2023-02-29"]}, lambda day: day),
    ],
)  # fmt: skip
def test_dates_are_real_wherever_they_stand(constraints, schema, place):
    assert allowed(constraints, schema, place("2024-02-29"))
    assert not allowed(constraints, schema, place("2023-02-29"))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "date", "pattern": "^2024-"},
        {"type": "string", "format": "uuid"},
        {"properties": {"format": {"const": "date"}}},
        {"enum": [DATE], "const": DATE, "default": DATE, "examples": [DATE]},
        {"required": ["format", "date"]},
    ],
)
def test_patterns_of_ones_own_other_formats_and_values_are_left_as_they_are(schema):
    assert with_real_dates(schema) == schema


def test_a_property_that_is_called_format_is_no_format(constraints):
    schema = {"type": "object", "properties": {"format": {"const": "date"}, "pattern": DATE}, "required": ["format", "pattern"]}
    assert allowed(constraints, schema, {"format": "date", "pattern": "2024-02-29"})
    assert not allowed(constraints, schema, {"format": "date", "pattern": "2023-02-29"})
