"""What grammars of calls allow, byte by byte, and that the parser reads it."""

import json

import pytest

from llmserve.engine.constraint import Constraints
from llmserve.engine.generation import Grammar
from llmserve.engine.output_parser import CallArguments, CallBegin, OutputParser
from llmserve.engine.tool_formats import (
    FORMATS,
    HERMES,
    LLAMA_3,
    MISTRAL,
    Function,
    forced_grammar,
    free_grammar,
    guided_grammar,
)
from tests.fakes import byte_tokenizer
from tests.grammars import accepts

FUNCTIONS = (
    Function("weather", "", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}),
    Function("now"),
)
WEATHER = '{"name": "weather", "arguments": {"city": "Paris"}}'
NOW = '{"name": "now", "arguments": {}}'


@pytest.fixture(scope="module")
def constraints():
    return Constraints(byte_tokenizer())


@pytest.mark.parametrize(
    ("form", "parallel", "text", "right"),
    [
        (HERMES, True, f"{WEATHER}\n</tool_call>", True),
        (HERMES, True, f"{WEATHER}\n</tool_call>\n<tool_call>\n{NOW}\n</tool_call>", True),
        (HERMES, False, f"{WEATHER}\n</tool_call>\n<tool_call>\n{NOW}\n</tool_call>", False),
        (HERMES, True, f"{WEATHER}\n", False),
        (HERMES, True, "Hello", False),
        (HERMES, True, f"{WEATHER}\n</tool_call>".replace("weather", "wether"), False),
        (HERMES, True, f"{NOW}\n</tool_call>".replace("{}", '{"a": 1}'), False),
        (HERMES, True, f"{WEATHER}\n</tool_call>".replace('"Paris"', "1"), False),
        (MISTRAL, True, f"[{WEATHER}, {NOW}]", True),
        (MISTRAL, False, f"[{WEATHER}]", True),
        (MISTRAL, False, f"[{WEATHER}, {NOW}]", False),
        (LLAMA_3, True, f"{WEATHER}; {NOW}".replace("arguments", "parameters"), True),
        (LLAMA_3, True, WEATHER, False),
    ],
)
def test_a_forced_answer_is_right_calls_and_nothing_else(constraints, form, parallel, text, right):
    assert accepts(constraints, Grammar("lark", forced_grammar(form, FUNCTIONS, parallel=parallel)), text) == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Hello <tool>.", True),
        ("", True),
        (f"Well.\n<tool_call>\n{NOW}\n</tool_call>", True),
        (f"<tool_call>\n{NOW}\n</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call> So.", True),
        ("<tool_call> is a tag", False),
        (f"<tool_call>\n{NOW}", False),
    ],
)
def test_a_free_answer_may_be_anything_but_a_wrong_call(constraints, text, right):
    assert accepts(constraints, Grammar("lark", free_grammar(HERMES, FUNCTIONS)), text) == right


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["f", "a-b_C9"])
def test_what_is_forced_is_read_as_a_call(constraints, form, name):
    function = Function(name, "", {"type": "object", "properties": {"x": {"const": "a}]"}}, "required": ["x"]})
    constraint = constraints.get(Grammar("lark", forced_grammar(form, [function], parallel=False))).copy()
    text = bytearray()
    while not constraint.complete:  # there is one way only
        (token_id,) = (token_id for token_id in range(256) if constraint.allows(token_id))
        text.append(token_id)
        constraint.advance(token_id)
    parser = OutputParser([name], forced=True)
    begin, *arguments = parser.push(text.decode()) + parser.flush()
    assert begin == CallBegin(0, name)
    assert all(isinstance(part, CallArguments) for part in arguments)
    assert json.loads("".join(part.text for part in arguments)) == {"x": "a}]"}


@pytest.mark.parametrize(
    ("schema", "text", "right"),
    [
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}', True),
        ({"properties": {"a": {"type": "integer"}}}, '{"b": 1}', False),
        ({"properties": {"a": {"properties": {"b": {"type": "null"}}}}}, '{"a": {"c": 1}}', False),
        ({"properties": {"a": {"items": {"properties": {}}}}}, '{"a": [{}]}', True),
        ({"properties": {}, "additionalProperties": {"type": "integer"}}, '{"b": 1}', True),
        ({"additionalProperties": True}, '{"b": 1}', True),
    ],
)
def test_members_that_a_schema_does_not_name_are_not_made_up(constraints, schema, text, right):
    grammar = Grammar("lark", forced_grammar(LLAMA_3, [Function("f", "", schema)], parallel=False))
    assert accepts(constraints, grammar, f'{{"name": "f", "parameters": {text}}}') == right


def written(form, *calls):
    """Calls as an answer shows them that has them by choice."""
    spelt = [call.replace("arguments", form.key) for call in calls]
    if form.array:
        return f"{form.opener}[{', '.join(spelt)}]"
    if form.closer:
        return "\n".join(f"{form.opener}\n{call}\n{form.closer}" for call in spelt)
    return "; ".join(spelt)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("schema", "text", "right"),
    [
        ({"properties": {"x": {"type": "integer"}}, "additionalProperties": False}, '{"x": 1}', True),
        ({"properties": {"x": {"type": "integer"}}, "additionalProperties": False}, '{"y": 1}', False),
        ({"properties": {"x": {"type": "integer"}}, "additionalProperties": False}, "Hello", False),
        ({"properties": {"name": {"type": "string"}}, "additionalProperties": False}, '{"name": "nowhere"}', True),
        ({"properties": {"name": {"type": "string"}}, "additionalProperties": False}, '{"name": 1}', False),
        ({"properties": {"name": {"enum": ["no", "now"]}, "x": {}}, "required": ["x"]}, '{"name": "no", "x": 1}', True),
        ({"properties": {"name": {"type": "object"}}}, '{"name": {"name": "now"}}', True),
        ({"type": "object"}, '{"names": 1}', True),
        ({"type": "array"}, '[["TOOL_CALLS"]]', True),
        ({"type": "array"}, "[]", True),
    ],
)
def test_beside_calls_an_answer_may_be_all_that_its_schema_allows(constraints, form, schema, text, right):
    grammar = Grammar("lark", guided_grammar(form, FUNCTIONS, json.dumps({"type": "object"} | schema), parallel=True))
    assert accepts(constraints, grammar, text) == right
    for call in (WEATHER, NOW):
        assert accepts(constraints, grammar, written(form, call))


def beside_name(form, *, parallel=True):
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "additionalProperties": False}
    return Grammar("lark", guided_grammar(form, FUNCTIONS, json.dumps(schema), parallel=parallel))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "call", [NOW.replace("now", "nowhere"), NOW.replace("{}", '{"a": 1}'), WEATHER.replace('"Paris"', "1")]
)
def test_beside_an_answer_of_a_schema_calls_are_right_ones(constraints, form, call):
    assert not accepts(constraints, beside_name(form), written(form, call))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("parallel", [True, False])
def test_beside_an_answer_of_a_schema_there_are_several_calls_only_where_they_may_be(constraints, form, parallel):
    assert accepts(constraints, beside_name(form, parallel=parallel), written(form, WEATHER, NOW)) == parallel


@pytest.mark.parametrize("form", FORMATS)
def test_a_call_beside_an_answer_of_a_schema_is_read_as_one(form):
    parser = OutputParser(["weather", "now"])
    parts = parser.push(written(form, WEATHER, NOW)) + parser.flush()
    assert [part for part in parts if isinstance(part, CallBegin)] == [CallBegin(0, "weather"), CallBegin(1, "now")]
    assert all(isinstance(part, CallBegin | CallArguments) for part in parts)


def test_a_call_that_has_an_opener_is_none_without_it_beside_an_answer_of_a_schema(constraints):
    assert not accepts(constraints, beside_name(HERMES), f"{NOW}\n</tool_call>")


@pytest.mark.parametrize(("day", "right"), [("2024-02-29", True), ("2023-02-29", False)])
def test_dates_are_real_in_calls_and_beside_them(constraints, day, right):
    schema = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]}
    functions = [Function("f", "", schema)]
    forced = Grammar("lark", forced_grammar(HERMES, functions, parallel=False))
    guided = Grammar("lark", guided_grammar(HERMES, functions, json.dumps(schema), parallel=False))
    arguments = json.dumps({"day": day})
    assert accepts(constraints, forced, f'{{"name": "f", "arguments": {arguments}}}\n</tool_call>') == right
    assert accepts(constraints, guided, arguments) == right
