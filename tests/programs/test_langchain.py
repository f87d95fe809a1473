"""LangChain's ChatOpenAI and OpenAIEmbeddings."""

import pytest

from tests.programs.conftest import EMBEDDER, QUESTION
from tests.programs.weather import Weather


@pytest.fixture
def model(documented):
    from langchain_openai import ChatOpenAI

    documented_model = eval(documented("LangChain"), {"ChatOpenAI": ChatOpenAI})
    return documented_model.model_copy(update={"temperature": 0, "max_tokens": 100, "max_retries": 0})


def test_an_answer_and_its_stream(model):
    whole = model.invoke(QUESTION)
    assert whole.content and whole.usage_metadata["input_tokens"] > 0
    chunks = list(model.stream(QUESTION, stream_usage=True))
    assert len(chunks) > 10
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert (
        sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata)
        == (whole.usage_metadata["output_tokens"])
    )


def test_several_at_once(model):
    answers = model.bind(max_tokens=10).batch([QUESTION, "Hello", "Name a river."])
    assert all(answer.content for answer in answers)


def test_a_bound_tool_is_called_whole_and_streamed(model):
    bound = model.bind_tools([Weather], tool_choice="Weather")
    (call,) = bound.invoke(QUESTION).tool_calls
    assert call["name"] == "Weather"
    Weather(**call["args"])
    first, *rest = bound.stream(QUESTION)
    for chunk in rest:
        first += chunk
    assert [each["args"] for each in first.tool_calls] == [call["args"]]


def test_a_tools_result_goes_back(model):
    from langchain_core.messages import HumanMessage, ToolMessage

    asked = HumanMessage(QUESTION)
    called = model.bind_tools([Weather], tool_choice="any").invoke([asked])
    results = [ToolMessage("18 degrees", tool_call_id=call["id"]) for call in called.tool_calls]
    assert model.invoke([asked, called, *results]).content


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output(model, method):
    assert isinstance(model.with_structured_output(Weather, method=method).invoke(QUESTION), Weather)


def test_embeddings(url):
    from langchain_openai import OpenAIEmbeddings

    # It would send the ids of OpenAI's own tokenizer otherwise.
    model = OpenAIEmbeddings(model=EMBEDDER, base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False)
    first, second = model.embed_documents(["hello world", "a river"])
    assert len(first) == len(second) == 64
    assert model.embed_query("hello world") == pytest.approx(first, abs=1e-6)
