"""Tools through HTTP: what the prompt says, what a call becomes whole and streamed, what is kept right by a grammar."""

import json

import pytest

from llmserve.api import message as messages
from tests.api.conftest import chat_body
from tests.fakes import TEMPLATE, say

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
NOW_CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(autouse=True)
def ids(monkeypatch):
    """Ids that do not differ from answer to answer."""
    monkeypatch.setattr(messages, "unique", lambda: "1")


@pytest.fixture
def ask(serve):
    """A chat whose model would say `text`: its whole message and finish reason, and the same of its stream."""

    def ask(text, **parameters):
        served = serve(say(text), context_length=2048)
        parameters = {"tools": [WEATHER, NOW], "temperature": 0, "max_tokens": 300} | parameters
        whole = served.chat(**parameters)
        assert whole.status_code == 200, whole.json
        stream = served.chat(**parameters, stream=True)
        assert stream.headers["X-Cache"] == "hit"  # its log goes through the same parser
        (choice,) = whole.json["choices"]
        assert assembled(stream) == (choice["message"], choice["finish_reason"])
        return choice["message"], choice["finish_reason"]

    return ask


def chunks(response):
    return [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n")[:-2]]


def assembled(response):
    """The deltas put together as the official Python client does it."""
    message, finish_reason = {}, None
    for chunk in chunks(response):
        for choice in chunk["choices"]:
            finish_reason = choice["finish_reason"] or finish_reason
            accumulate(message, choice["delta"])
    for call in message.get("tool_calls", ()):
        del call["index"]
    return message, finish_reason


def accumulate(into, delta):
    for name, value in delta.items():
        if isinstance(value, list):
            for entry in value:
                calls = into.setdefault(name, [])
                if entry["index"] == len(calls):
                    assert entry["id"].startswith("call_") and entry["type"] == "function" and entry["function"]["name"]
                    calls.append(entry)
                else:
                    assert entry.keys() == {"index", "function"}
                    accumulate(calls[entry["index"]]["function"], entry["function"])
        elif isinstance(value, dict):
            accumulate(into.setdefault(name, {}), value)
        elif isinstance(value, str) and into.get(name) is not None:
            into[name] += value
        else:
            into[name] = value


def call(name, arguments):
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_call_is_no_content(ask):
    message, finish_reason = ask(CALL)
    assert message == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [call("weather", '{"city": "Oslo"}')],
    }
    assert finish_reason == "tool_calls"


def test_what_is_said_beside_calls_is_content(ask):
    message, finish_reason = ask(f"Let me see.\n{CALL}\n{NOW_CALL}")
    assert message["content"] == "Let me see."
    assert message["tool_calls"] == [call("weather", '{"city": "Oslo"}'), call("now", "{}")]
    assert finish_reason == "tool_calls"


def test_an_answer_without_a_call_is_an_answer(ask):
    assert ask("It is <fine>.") == ({"role": "assistant", "content": "It is <fine>.", "refusal": None}, "stop")


@pytest.mark.parametrize("parameters", [{"tool_choice": "none"}, {"tools": []}])
def test_without_tools_what_looks_like_a_call_is_text(ask, parameters):
    message, finish_reason = ask(CALL, **parameters)
    assert (message["content"], finish_reason, "tool_calls" in message) == (CALL, "stop", False)


def test_only_one_call_when_they_may_not_be_parallel(ask):
    message, _ = ask(f"{CALL}\n{NOW_CALL}", parallel_tool_calls=False)
    assert message["tool_calls"] == [call("weather", '{"city": "Oslo"}')]


def test_a_cut_call_keeps_its_length_as_the_reason(ask):
    message, finish_reason = ask(CALL, max_tokens=len(CALL) - 18)
    assert finish_reason == "length"
    assert message["tool_calls"][0]["function"]["arguments"].startswith('{"city": "Os')
    message, finish_reason = ask(CALL, max_tokens=20)
    assert (message["content"], finish_reason) == ("", "length")


FORCED = [
    ("required", ["weather", "now"]),
    ({"type": "function", "function": {"name": "now"}}, ["now"]),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NOW]}}, ["now"]),
]


@pytest.mark.parametrize(("choice", "names"), FORCED)
def test_a_forced_answer_is_a_right_call_whatever_the_model_would_say(ask, choice, names):
    message, finish_reason = ask("Hello, I would rather talk.", tool_choice=choice)
    assert message["content"] is None
    assert finish_reason == "tool_calls"
    for each in message["tool_calls"]:
        assert each["function"]["name"] in names
        assert json.loads(each["function"]["arguments"]) == ({"city": "Oslo"} if each["function"]["name"] == "weather" else {})


def test_allowed_tools_are_the_only_ones(ask):
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NOW]}}
    message, _ = ask("Fine.", tool_choice=choice)
    assert message["content"] == "Fine."
    message, _ = ask(NOW_CALL, tool_choice=choice)
    assert message["tool_calls"] == [call("now", "{}")]


def test_beside_a_response_format_an_answer_is_of_that_or_a_call(ask):
    schema = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False}
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    assert ask('{"x": 1}', **wanted)[0]["content"] == '{"x": 1}'
    assert ask(CALL, **wanted)[0]["tool_calls"] == [call("weather", '{"city": "Oslo"}')]


def test_several_choices_have_calls_of_their_own(serve):
    response = serve(say(CALL), context_length=2048).chat(tools=[WEATHER], n=2, temperature=0, max_tokens=200)
    assert [choice["message"]["tool_calls"][0]["function"]["name"] for choice in response.json["choices"]] == ["weather"] * 2


def test_the_older_functions_are_answered_in_their_own_words(ask):
    functions = [WEATHER["function"], NOW["function"]]
    for text, choice in ((CALL, "auto"), (CALL, None), ("Hello", {"name": "weather"})):
        message, finish_reason = ask(text, tools=None, functions=functions, function_call=choice)
        expected = {"name": "weather", "arguments": '{"city": "Oslo"}'}
        assert message == {"role": "assistant", "content": None, "refusal": None, "function_call": expected}
        assert finish_reason == "function_call"


def test_a_native_template_is_left_to_the_model_unless_a_function_is_strict(serve):
    """With a grammar the arguments must be right; without one the model writes what it likes."""
    shows_tools = "<start>{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}{{ m['role'] }}"
    template = TEMPLATE.replace("{{ raise_exception('no tools here') }}", "").replace("<start>{{ m['role'] }}", shows_tools)
    wrong = CALL.replace("Oslo", "Rome")
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    served = serve(say(wrong), template=template, context_length=2048)
    answers = [served.chat(tools=[tool], temperature=0, max_tokens=200) for tool in (WEATHER, strict)]
    arguments = [answer.json["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] for answer in answers]
    assert arguments[0] == '{"city": "Rome"}'
    assert arguments[1].startswith('{"city": "Oslo"')


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "x"}}]}}}, "tool_choice"),
        ({"tools": [], "function_call": {"name": "f"}}, "function_call"),
    ],
)  # fmt: skip
def test_a_choice_of_what_is_not_there_is_refused(served, parameters, param):
    response = served.chat(**({"tools": [WEATHER]} | parameters))
    assert (response.status_code, response.json["error"]["param"], response.json["error"]["code"]) == (
        400,
        param,
        "invalid_value",
    )


def test_a_schema_that_cannot_be_enforced_is_named(serve):
    served = serve(context_length=2048)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "nothing"}}}}}
    response = served.chat(tools=[NOW, tool], tool_choice="required")
    assert response.status_code == 400
    assert response.json["error"]["param"].startswith("tools[1].function.parameters")


def test_calls_and_results_of_the_history_are_in_the_prompt(served):
    history = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call("weather", '{"city": "Oslo"}')]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Rain."}]},
    ]
    prompt = served.client.post("/apply-template", json=chat_body(messages=history, tools=[WEATHER])).json["prompt"]
    assert f"<start>assistant\n{CALL}<end>" in prompt
    assert "<start>user\n<tool_response>\nRain.\n</tool_response><end>" in prompt
    assert '"name": "weather"' in prompt.partition("<end>")[0]


class TestReasoning:
    def test_it_is_apart_from_the_content_when_the_model_is_configured_so(self, serve):
        served = serve(say("<think>\nHm.\n</think>\n\nYes."), model={"reasoning": True})
        whole = served.chat(temperature=0, max_tokens=100)
        (choice,) = whole.json["choices"]
        assert choice["message"] == {"role": "assistant", "content": "Yes.", "refusal": None, "reasoning_content": "Hm."}
        assert assembled(served.chat(temperature=0, max_tokens=100, stream=True)) == (choice["message"], "stop")

    def test_it_is_content_otherwise(self, serve):
        text = "<think>\nHm.\n</think>\n\nYes."
        assert serve(say(text)).chat(temperature=0, max_tokens=100).json["choices"][0]["message"]["content"] == text

    def test_a_block_that_the_template_begins_belongs_to_it(self, serve):
        served = serve(
            say("<think>\nHm.\n</think>Yes."[8:]),
            template=TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n{%"),
            model={"reasoning": True},
        )
        for _ in range(2):  # the second one from the cache
            message = served.chat(temperature=0, max_tokens=100).json["choices"][0]["message"]
            assert "Yes." in message["content"] or "Yes." in message["reasoning_content"]
