"""LiteLLM's `completion`."""

import pytest

from tests.programs.conftest import QUESTION
from tests.programs.weather import Weather


@pytest.fixture
def complete(documented):
    import litellm

    def complete(**options):
        shared = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 40}

        def completion(**documented):
            return litellm.completion(**documented | shared | options)

        return eval(documented("LiteLLM"), {"completion": completion})

    return complete


def test_an_answer_and_its_stream(complete):
    whole = complete().choices[0].message.content
    assert whole
    assert "".join(chunk.choices[0].delta.content or "" for chunk in complete(stream=True)) == whole


def test_a_call(complete):
    tool = {"type": "function", "function": {"name": "Weather", "parameters": Weather.model_json_schema()}}
    answer = complete(tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=100)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "Weather"
    Weather.model_validate_json(call.function.arguments)


def test_a_model_as_response_format(complete):
    Weather.model_validate_json(complete(response_format=Weather).choices[0].message.content)
