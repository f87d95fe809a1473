"""Tools, embeddings and reasoning through the official Python client and its helpers, on each engine."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import urllib.request
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.e2e.conftest import EMBEDDER, MODEL


def function(name, **parameters):
    schema = {"type": "object", "properties": parameters, "required": list(parameters), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}


CITY = {"enum": ["Paris", "Oslo", "Lima"]}
WEATHER = function("get_weather", city=CITY)
ADD = function("add", a={"type": "integer", "minimum": 0, "maximum": 99}, b={"type": "integer", "minimum": 0, "maximum": 99})
NOW = function("now")
NESTED = function(
    "book", person={"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}}, "required": ["name"]}
)
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
OPTIONS = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 120}


def named(name):
    return {"type": "function", "function": {"name": name}}


def allowed(mode, *tools):
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(tool) for tool in tools]}}


def check_arguments(name, text):
    arguments = json.loads(text)
    if name == "get_weather":
        assert arguments.keys() == {"city"} and arguments["city"] in CITY["enum"]
    elif name == "add":
        assert arguments.keys() == {"a", "b"} and all(0 <= value <= 99 for value in arguments.values())
    elif name == "now":
        assert arguments == {}
    else:
        assert isinstance(arguments["person"]["name"], str)


FORCED = [
    ("required", {"get_weather", "add", "now"}),
    (named("get_weather"), {"get_weather"}),
    (named("add"), {"add"}),
    (named("now"), {"now"}),
    (named("book"), {"book"}),
    (allowed("required", "now", "add"), {"now", "add"}),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}, {"temperature": 1, "seed": 4, "n": 2}]
)
@pytest.mark.parametrize(("choice", "names"), FORCED)
def test_a_forced_call_is_right_whatever_the_temperature(client, choice, names, options, stream):
    tools = [WEATHER, ADD, NOW, NESTED]
    asked = {**OPTIONS, **options, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**asked)
    for made in answer.choices:
        assert made.finish_reason == "tool_calls"
        assert made.message.content is None
        (call,) = made.message.tool_calls
        assert call.id.startswith("call_") and call.type == "function"
        assert call.function.name in names or choice == "required"
        check_arguments(call.function.name, call.function.arguments)


@pytest.mark.parametrize("choice", ["auto", "none", None, allowed("auto", "now")])
def test_an_answer_that_may_call_streams_what_it_is_whole(client, choice):
    asked = {**OPTIONS, "max_tokens": 40, "tools": [WEATHER, NOW]} | ({} if choice is None else {"tool_choice": choice})
    whole = client.chat.completions.create(**asked).choices[0]
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == (whole.message.content or "")
    arguments = "".join(call.function.arguments for delta in deltas for call in delta.tool_calls or ())
    assert arguments == "".join(call.function.arguments for call in whole.message.tool_calls or ())
    assert "<tool_call>" not in (whole.message.content or "")


ADD_CALL = r'<tool_call>\n\{"name": "add", "arguments": \{"a": [1-9], "b": [1-9]\}\}\n</tool_call>'
AUTO = {
    "a call": (ADD_CALL, "", 1),
    "two calls": (rf"{ADD_CALL}\n{ADD_CALL}", "", 2),
    "words and a call": (rf"I will add\.\n{ADD_CALL}", "I will add.", 1),
    "a call and words": (rf"{ADD_CALL}\nSo\.", "So.", 1),
    "words alone": (r"I <b>add</b>\.", "I <b>add</b>.", 0),
}


@pytest.mark.parametrize("helper", ["chunks", "the helper"])
@pytest.mark.parametrize("name", AUTO)
def test_a_call_of_the_models_own_accord_streams_as_deltas_without_markup(client, name, helper):
    """The model is brought to write its markup by a regular expression: nothing says that this will be a call."""
    regex, content, num_calls = AUTO[name]
    asked = {**OPTIONS, "tools": [WEATHER, ADD], "tool_choice": "auto", "extra_body": {"regex": regex}, "max_tokens": 150}
    whole = client.chat.completions.create(**asked).choices[0]
    assert (whole.message.content or "", len(whole.message.tool_calls or ())) == (content, num_calls)
    assert whole.finish_reason == ("tool_calls" if num_calls else "stop")
    for call in whole.message.tool_calls or ():
        check_arguments("add", call.function.arguments)
    if helper == "chunks":
        streamed = assembled(client.chat.completions.create(**asked, stream=True))
        assert streamed == (whole.message.content, calls_of(whole.message), whole.finish_reason)
    else:
        with client.chat.completions.stream(**asked) as events:
            final = events.get_final_completion().choices[0]
        assert (final.message.content or None) == (whole.message.content or None)
        assert (calls_of(final.message), final.finish_reason) == (calls_of(whole.message), whole.finish_reason)


def calls_of(message):
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]


def assembled(chunks):
    """Content, calls and finish reason of a stream's one choice; each call has its id, type and name once, at its beginning."""
    content, calls, reason = None, [], None
    for chunk in chunks:
        (choice,) = chunk.choices
        assert reason is None, "a chunk behind the finish reason"
        reason = choice.finish_reason
        if choice.delta.content is not None:
            content = (content or "") + choice.delta.content
        for delta in choice.delta.tool_calls or ():
            if delta.index == len(calls):
                assert delta.id and delta.type == "function" and delta.function.name
                calls.append((delta.function.name, delta.function.arguments))
            else:
                assert delta.index == len(calls) - 1 and delta.id is delta.type is delta.function.name is None
                calls[-1] = (calls[-1][0], calls[-1][1] + delta.function.arguments)
    return content, calls, reason


def test_parallel_calls_have_ids_of_their_own(client):
    answer = client.chat.completions.create(**OPTIONS | {"max_tokens": 200}, tools=[NOW, ADD], tool_choice="required")
    calls = answer.choices[0].message.tool_calls
    assert len({call.id for call in calls}) == len(calls) >= 1


def test_a_tool_loop_of_three_turns_ends(client):
    messages = [*QUESTION]
    for turn in range(3):
        choice = "required" if turn < 2 else "none"
        answer = client.chat.completions.create(
            model=MODEL,
            messages=messages,
            tools=[WEATHER],
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=0,
            max_tokens=60,
        )
        message = answer.choices[0].message
        messages.append(message)  # as the client's own object: it sends it back with its nulls
        calls = message.tool_calls or ()
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"} for call in calls]
    assert message.content
    assert message.tool_calls is None


class GetWeather(BaseModel):
    city: Literal["Paris", "Oslo", "Lima"]


def test_the_parse_helper_makes_models_of_arguments(client):
    tool = openai.pydantic_function_tool(GetWeather)
    answer = client.chat.completions.parse(**OPTIONS, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_the_stream_helper_tells_arguments_as_they_come(client):
    tool = openai.pydantic_function_tool(GetWeather)
    with client.chat.completions.stream(**OPTIONS, tools=[tool], tool_choice=named("GetWeather")) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, GetWeather)


def test_the_async_client_calls_too(base_url):
    async def run():
        asked = {**OPTIONS, "tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}
        client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)
        async with client, client.chat.completions.stream(**asked) as stream:
            return await stream.get_final_completion()

    (call,) = asyncio.run(run()).choices[0].message.tool_calls
    check_arguments("add", call.function.arguments)


@pytest.mark.parametrize("choice", [{"name": "add"}, "none"])
def test_the_older_functions(client, choice):
    answer = client.chat.completions.create(**OPTIONS, functions=[ADD["function"]], function_call=choice).choices[0]
    if choice == "none":
        assert answer.message.function_call is None
    else:
        assert (answer.finish_reason, answer.message.function_call.name) == ("function_call", "add")
        check_arguments("add", answer.message.function_call.arguments)


MISTAKES = [
    ({"tools": [WEATHER], "tool_choice": named("sub")}, "tool_choice", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0]", "unsupported_parameter"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
    ({"messages": [{"role": "tool", "tool_call_id": "call_1", "content": ""}]}, "messages.[0].role", None),
]


@pytest.mark.parametrize(("changes", "param", "code"), MISTAKES)
def test_mistakes_with_tools_are_named(client, changes, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**OPTIONS, **changes})
    assert (caught.value.param, caught.value.code) == (param, code)


# Embeddings.

TEXTS = ["hello world", "the river runs to sea"]
INPUTS = [TEXTS[0], TEXTS, TEXTS[:1], [5, 6, 7], [[5, 6, 7], [8]]]


@pytest.mark.parametrize("encoding", [openai.NOT_GIVEN, "float", "base64"])
@pytest.mark.parametrize("texts", INPUTS, ids=str)
def test_embeddings(client, texts, encoding):
    answer = client.embeddings.create(model=EMBEDDER, input=texts, encoding_format=encoding)
    several = isinstance(texts, list) and not isinstance(texts[0], int)
    assert [each.index for each in answer.data] == list(range(len(texts) if several else 1))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    for each in answer.data:
        vector = each.embedding
        if isinstance(vector, str):
            data = base64.b64decode(vector)
            vector = struct.unpack(f"<{len(data) // 4}f", data)
        assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-4)


def test_a_texts_embedding_does_not_depend_on_its_batch(client):
    together = [each.embedding for each in client.embeddings.create(model=EMBEDDER, input=TEXTS).data]
    assert together == [client.embeddings.create(model=EMBEDDER, input=text).data[0].embedding for text in TEXTS]


@pytest.mark.parametrize("dimensions", [1, 8, 64])
def test_fewer_dimensions_are_the_first_ones_at_length_one(client, dimensions):
    whole = client.embeddings.create(model=EMBEDDER, input="hello").data[0].embedding[:dimensions]
    length = sum(value * value for value in whole) ** 0.5
    fewer = client.embeddings.create(model=EMBEDDER, input="hello", dimensions=dimensions).data[0].embedding
    assert fewer == pytest.approx([value / length for value in whole], abs=1e-5)


EMBEDDING_MISTAKES = [
    ({"input": ""}, "input", "empty_string"),
    ({"input": []}, "input", "empty_array"),
    ({"input": [TEXTS[0], ""]}, "input[1]", "empty_string"),
    ({"input": [10**6]}, "input", "invalid_value"),
    ({"input": "river " * 1000}, "input", "context_length_exceeded"),
    ({"dimensions": 65}, "dimensions", "integer_above_max_value"),
    ({"dimensions": 0}, "dimensions", "integer_below_min_value"),
    ({"encoding_format": "hex"}, "encoding_format", "invalid_value"),
    ({"model": MODEL}, "model", "unsupported_value"),
]


@pytest.mark.parametrize(("changes", "param", "code"), EMBEDDING_MISTAKES, ids=lambda value: str(value)[:30])
def test_mistakes_with_embeddings_are_named(client, changes, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**{"model": EMBEDDER, "input": "hello", **changes})
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize("prompt", [None, "hello", [5, 6, 7], [[5], [6]]], ids=str)
def test_an_embedding_model_does_not_write(client, prompt):
    with pytest.raises(openai.BadRequestError) as caught:
        if prompt is None:
            client.chat.completions.create(**OPTIONS | {"model": EMBEDDER})
        else:
            client.completions.create(model=EMBEDDER, prompt=prompt)
    assert (caught.value.param, caught.value.code) == ("model", "unsupported_value")


# Around the API.


def post(base_url, path, **body):
    url = base_url.removesuffix("/v1") + path
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_a_text_survives_its_tokens(base_url):
    tokens = post(base_url, "/tokenize", model=MODEL, prompt="Ünïcode <|im_end|> text")
    assert tokens["count"] == len(tokens["tokens"])
    assert post(base_url, "/detokenize", model=MODEL, tokens=tokens["tokens"])["prompt"] == "Ünïcode <|im_end|> text"


def test_a_chats_tokens_are_those_of_its_usage(base_url, client):
    tokens = post(base_url, "/tokenize", model=MODEL, messages=QUESTION)
    usage = client.chat.completions.create(**OPTIONS | {"max_tokens": 1}).usage
    assert tokens["count"] == usage.prompt_tokens
    prompt = post(base_url, "/apply-template", model=MODEL, messages=QUESTION)["prompt"]
    assert prompt.endswith("<|im_start|>user\nWhat is the weather in Paris?<|im_end|>\n<|im_start|>assistant\n")
