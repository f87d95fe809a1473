"""LlamaIndex's OpenAILike."""

import pytest

from tests.programs.conftest import QUESTION
from tests.programs.weather import Weather


@pytest.fixture
def model(documented):
    from llama_index.llms.openai_like import OpenAILike

    return eval(documented("LlamaIndex"), {"OpenAILike": OpenAILike}).model_copy(
        update={"temperature": 0, "max_tokens": 40, "max_retries": 0}
    )


@pytest.fixture
def messages():
    from llama_index.core.llms import ChatMessage

    return [ChatMessage(role="system", content="You are brief."), ChatMessage(role="user", content=QUESTION)]


def test_a_completion_and_its_stream(model):
    whole = model.complete(QUESTION).text
    assert whole
    assert "".join(part.delta for part in model.stream_complete(QUESTION)) == whole


def test_a_plain_completion_and_its_stream(model):
    plain = model.model_copy(update={"is_chat_model": False})
    whole = plain.complete("The river runs to the").text
    assert whole
    assert "".join(part.delta for part in plain.stream_complete("The river runs to the")) == whole


def test_a_chat_and_its_stream(model, messages):
    whole = model.chat(messages).message.content
    assert whole
    assert "".join(part.delta for part in model.stream_chat(messages)) == whole


def test_structured_output(model):
    from llama_index.core.prompts import PromptTemplate

    answer = model.model_copy(update={"max_tokens": 100}).structured_predict(Weather, PromptTemplate(QUESTION))
    assert isinstance(answer, Weather)
