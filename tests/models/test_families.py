"""The default model under the families' templates: a forced call is right at any temperature, and a stream says the same.

The model has learnt none of these forms, so that all that is right is the grammar's doing.
"""

import json
from dataclasses import replace

import jsonschema
import pytest
from werkzeug.test import Client

from llmserve import create_app
from llmserve.config import DEFAULT_MODEL, Config
from tests import families
from tests.api.test_tools import assembled
from tests.e2e.conftest import ENGINES

FAMILIES = ["QWEN", "LLAMA", "MISTRAL"]
SCHEMAS = {
    "add": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"]},
    "book": {
        "type": "object",
        "properties": {
            "person": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]},
            "seats": {"type": "array", "items": {"enum": ["A1", "B2"]}, "minItems": 1, "maxItems": 2},
        },
        "required": ["person", "seats"],
    },
    "now": {"type": "object", "properties": {}},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
QUESTION = {"role": "user", "content": "Book a seat for me."}
BOOK = {"type": "function", "function": {"name": "book"}}


@pytest.fixture(scope="module", params=ENGINES)
def ask(request):
    specs = [
        replace(
            DEFAULT_MODEL, id=name, aliases=(), engine=request.param, chat_template=getattr(families, name), context_length=2048
        )
        for name in FAMILIES
    ]
    app = create_app(Config(models=tuple(replace(spec, load="on_demand") for spec in specs)))
    client = Client(app)

    def ask(family, **fields):
        body = {"model": family, "messages": [QUESTION], "tools": TOOLS, "temperature": 1.5, "max_tokens": 120} | fields
        response = client.post("/v1/chat/completions", json=body, buffered=True)
        assert response.status_code == 200, response.text
        return response

    yield ask
    app.close()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", BOOK], ids=["required", "named"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_call_is_right_at_a_temperature_of_1_5(ask, family, choice, seed):
    options = {"tool_choice": choice, "seed": seed, "parallel_tool_calls": False}
    (whole,) = ask(family, **options).json["choices"]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    (call,) = whole["message"]["tool_calls"]
    name = call["function"]["name"]
    assert choice == "required" or name == "book"
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[name])
    streamed, reason = assembled(ask(family, **options, stream=True))
    assert reason == "tool_calls"
    assert streamed["tool_calls"][0]["function"] == call["function"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loop_of_three_turns_ends(ask, family):
    messages = [QUESTION]
    for choice in ("required", "required", "none"):
        patience = {} if choice == "required" else {"min_tokens": 8}  # random weights may end a text before it has begun
        (answer,) = ask(family, messages=messages, tool_choice=choice, seed=2, **patience).json["choices"]
        messages.append(answer["message"])
        calls = answer["message"].get("tool_calls", [])
        assert bool(calls) == (choice == "required")
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": "It is done."} for call in calls]
    assert messages[-1]["content"]
