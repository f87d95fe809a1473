import pytest

from llmserve.api.fields import (
    Array,
    Boolean,
    Either,
    Integer,
    Nullable,
    Number,
    Object,
    OneOf,
    String,
    Strings,
    Struct,
    Tagged,
    Unsupported,
    optional,
    required,
)
from llmserve.errors import InvalidParameter


class Point(Struct):
    x: int = required(Integer(0, 9))
    label: str | None = optional(String())
    note: str | None = required(Nullable(String()))


TEXT_OR_POINTS = Either(String(), Array(Point))


def error_of(parser, value, path="p"):
    with pytest.raises(InvalidParameter) as caught:
        parser.parse(value, path, [])
    return caught.value


@pytest.mark.parametrize(
    ("parser", "value", "parsed"),
    [
        (String(), "", ""),
        (String(1, 2), "ab", "ab"),
        (Integer(1, 5), 5, 5),
        (Number(0, 2), 2, 2.0),
        (Number(0, 2), 0.5, 0.5),
        (Boolean(), False, False),
        (OneOf(("a", "b")), "b", "b"),
        (Array(Integer(0, 9)), [1, 2], (1, 2)),
        (Object(), {"any": [1]}, {"any": [1]}),
        (Strings(1, String(), String()), {"k": "v"}, {"k": "v"}),
        (Nullable(String()), None, None),
        (Nullable(String()), "x", "x"),
        (TEXT_OR_POINTS, "x", "x"),
        (TEXT_OR_POINTS, [{"x": 1, "note": None}], (Point(x=1, note=None),)),
        (Tagged("type", {"one": Object()}), {"type": "one"}, {"type": "one"}),
        (Unsupported(Boolean(), (False,)), False, None),
    ],
)
def test_a_right_value_is_parsed(parser, value, parsed):
    result = parser.parse(value, "p", [])
    assert result == parsed
    assert type(result) is type(parsed)


@pytest.mark.parametrize(
    ("parser", "value", "message"),
    [
        (String(), 1, "Invalid type for 'p': expected a string, but got an integer instead."),
        (Integer(0, 9), True, "Invalid type for 'p': expected an integer, but got a boolean instead."),
        (Integer(0, 9), 1.0, "Invalid type for 'p': expected an integer, but got a decimal instead."),
        (Number(0, 9), "1", "Invalid type for 'p': expected a decimal, but got a string instead."),
        (Number(0, 9), True, "Invalid type for 'p': expected a decimal, but got a boolean instead."),
        (Boolean(), 0, "Invalid type for 'p': expected a boolean, but got an integer instead."),
        (OneOf(("a",)), None, "Invalid type for 'p': expected a string, but got null instead."),
        (Array(String()), {}, "Invalid type for 'p': expected an array of strings, but got an object instead."),
        (Object(), [], "Invalid type for 'p': expected an object, but got an array instead."),
        (TEXT_OR_POINTS, {}, "Invalid type for 'p': expected one of a string or array of objects, but got an object instead."),
    ],
)
def test_a_value_of_another_type_is_named(parser, value, message):
    error = error_of(parser, value)
    assert (error.message, error.code, error.param) == (message, "invalid_type", "p")


@pytest.mark.parametrize(
    ("parser", "value", "code", "message"),
    [
        (Integer(1, 5), 0, "integer_below_min_value", "integer below minimum value. Expected a value >= 1, but got 0 instead."),
        (Integer(1, 5), 6, "integer_above_max_value", "integer above maximum value. Expected a value <= 5, but got 6 instead."),
        (
            Number(0, 2),
            -0.1,
            "decimal_below_min_value",
            "decimal below minimum value. Expected a value >= 0, but got -0.1 instead.",
        ),
        (
            Number(0, 2),
            float("inf"),
            "decimal_above_max_value",
            "decimal above maximum value. Expected a value <= 2, but got inf instead.",
        ),
        (
            String(1),
            "",
            "empty_string",
            "empty string. Expected a string with minimum length 1, but got an empty string instead.",
        ),
        (
            String(0, 2),
            "abc",
            "string_above_max_length",
            "string too long. Expected a string with maximum length 2, but got a string with length 3 instead.",
        ),
        (
            Array(String(), 1),
            [],
            "empty_array",
            "empty array. Expected an array with minimum length 1, but got an empty array instead.",
        ),
        (
            Array(String(), 0, 1),
            ["a", "b"],
            "array_above_max_length",
            "array too long. Expected an array with maximum length 1, but got an array with length 2 instead.",
        ),
        (
            Strings(1, String(), String()),
            {"a": "", "b": ""},
            "object_above_max_properties",
            "too many properties. Expected an object with at most 1 properties, but got an object with 2 properties instead.",
        ),
    ],
)
def test_a_value_out_of_bounds_is_told_the_bound(parser, value, code, message):
    error = error_of(parser, value)
    assert (error.message, error.code, error.param) == (f"Invalid 'p': {message}", code, "p")


@pytest.mark.parametrize(
    ("values", "listing"), [(("a",), "'a'"), (("a", "b"), "'a' and 'b'"), (("a", "b", "c"), "'a', 'b', and 'c'")]
)
def test_an_unknown_value_is_told_the_known_ones(values, listing):
    for parser, value, param in ((OneOf(values), "x", "p"), (Tagged("t", dict.fromkeys(values, Object())), {"t": "x"}, "p.t")):
        error = error_of(parser, value)
        assert error.message == f"Invalid value: 'x'. Supported values are: {listing}."
        assert (error.code, error.param) == ("invalid_value", param)


def test_a_huge_value_is_not_repeated_whole():
    assert len(error_of(Integer(0, 9), 10**4000).message) < 200
    assert len(error_of(OneOf(("a",)), "x" * 4000).message) < 200


@pytest.mark.parametrize("value", [{}, {"x": None}, {"x": None, "note": "n"}])
def test_a_required_field_must_be_there_and_not_null(value):
    error = error_of(Point, value)
    assert (error.code, error.param) == ("missing_required_parameter", "p.x")


def test_null_is_the_same_as_absent_unless_it_is_a_value_of_its_own():
    assert Point.parse({"x": 1, "label": None, "note": None}, "", []) == Point(x=1, note=None)
    assert error_of(Point, {"x": 1}).param == "p.note"


def test_a_path_leads_to_the_wrong_value():
    nested = Array(Array(Point))
    assert error_of(nested, [[], [{"x": 1, "note": 5}]]).param == "p[1][0].note"
    assert error_of(Tagged("type", {}), {}).param == "p.type"
    assert error_of(Tagged("type", {}), {"type": 1}).code == "invalid_type"
    assert error_of(Strings(9, String(), String()), {"k": 1}).param == "p.k"


def test_unknown_fields_are_collected_with_their_paths_but_not_when_null():
    ignored = []
    Array(Point).parse([{"x": 1, "note": "", "y": 2, "z": None}], "points", ignored)
    Point.parse({"x": 1, "note": "", "w": 3}, "", ignored)
    assert ignored == ["points[0].y", "w"]


def test_what_is_not_supported_is_refused_by_name_after_its_type():
    parser = Unsupported(Boolean(), (False,))
    assert (error_of(parser, True).code, error_of(parser, True).param) == ("unsupported_parameter", "p")
    assert error_of(parser, 0).code == "invalid_type"
