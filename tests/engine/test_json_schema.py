"""Objects that are closed, and those that must not be."""

import jsonschema
import pytest

from llmserve.engine.json_schema import subschemas, without_others

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


@pytest.mark.parametrize(
    "nonsense", [5, None, "x", [[]], {"a": 5}, [{"$ref": 7}, {"type": 3}, {"required": [[]], "properties": 1}]]
)
@pytest.mark.parametrize("keyword", ["properties", "required", "allOf", "oneOf", "anyOf", "$defs", "items", "$ref", "type"])
def test_nonsense_is_left_to_who_compiles_it(keyword, nonsense):
    assert without_others({"properties": {}, keyword: nonsense})
    assert without_others({keyword: nonsense})
