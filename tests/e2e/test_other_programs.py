"""Programs that were written for OpenAI's API, unchanged. None of them is among our dependencies: where one is installed, it is run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Literal

import pytest
from pydantic import BaseModel

from tests.e2e.conftest import EMBEDDER, MODEL

QUESTION = "What is the weather in Paris?"

# Their own deprecations are none of ours.
pytestmark = pytest.mark.filterwarnings("ignore")


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Oslo", "Lima"]
    unit: Literal["celsius", "fahrenheit"]


class TestLangChain:
    @pytest.fixture
    def model(self, base_url):
        langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
        return langchain_openai.ChatOpenAI(
            model=MODEL, base_url=base_url, api_key="none", temperature=0, max_tokens=100, max_retries=0
        )

    def test_an_answer_and_its_stream(self, model):
        whole = model.invoke(QUESTION)
        assert whole.usage_metadata["input_tokens"] > 0
        assert "".join(chunk.content for chunk in model.stream(QUESTION)) == whole.content

    def test_a_bound_tool_is_called_whole_and_streamed(self, model):
        bound = model.bind_tools([Weather], tool_choice="Weather")
        (call,) = bound.invoke(QUESTION).tool_calls
        assert call["name"] == "Weather"
        Weather(**call["args"])
        chunks = list(bound.stream(QUESTION))
        merged = chunks[0]
        for chunk in chunks[1:]:
            merged += chunk
        assert [each["args"] for each in merged.tool_calls] == [call["args"]]

    def test_a_tools_result_goes_back(self, model):
        from langchain_core.messages import HumanMessage, ToolMessage

        asked = HumanMessage(QUESTION)
        called = model.bind_tools([Weather], tool_choice="any").invoke([asked])
        results = [ToolMessage("18 degrees", tool_call_id=call["id"]) for call in called.tool_calls]
        assert model.invoke([asked, called, *results]).content

    @pytest.mark.parametrize("method", ["function_calling", "json_schema"])
    def test_structured_output(self, model, method):
        assert isinstance(model.with_structured_output(Weather, method=method).invoke(QUESTION), Weather)

    def test_embeddings(self, base_url):
        langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
        # It would send the ids of OpenAI's own tokenizer otherwise.
        model = langchain_openai.OpenAIEmbeddings(
            model=EMBEDDER, base_url=base_url, api_key="none", check_embedding_ctx_length=False
        )
        first, second = model.embed_documents(["hello world", "a river"])
        assert len(first) == len(second) == 64
        assert model.embed_query("hello world") == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("mode", ["TOOLS"])
def test_instructor(client, mode):
    instructor = pytest.importorskip("instructor", reason="instructor is not installed")
    patched = instructor.from_openai(client, mode=instructor.Mode[mode])
    messages = [{"role": "user", "content": f"{QUESTION} Use celsius."}]
    answer = patched.chat.completions.create(
        model=MODEL, response_model=Weather, messages=messages, temperature=0, max_tokens=400, max_retries=0
    )
    assert isinstance(answer, Weather)


class TestLiteLLM:
    @pytest.fixture
    def complete(self, base_url):
        litellm = pytest.importorskip("litellm", reason="litellm is not installed")

        def complete(**options):
            messages = [{"role": "user", "content": QUESTION}]
            shared = {"model": f"openai/{MODEL}", "api_base": base_url, "api_key": "none", "temperature": 0, "max_tokens": 40}
            return litellm.completion(messages=messages, **shared | options)

        return complete

    def test_an_answer_and_its_stream(self, complete):
        whole = complete().choices[0].message.content
        assert whole
        assert "".join(chunk.choices[0].delta.content or "" for chunk in complete(stream=True)) == whole

    def test_a_call(self, complete):
        tool = {"type": "function", "function": {"name": "Weather", "parameters": Weather.model_json_schema()}}
        (call,) = (
            complete(tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=100)
            .choices[0]
            .message.tool_calls
        )
        assert call.function.name == "Weather"
        Weather.model_validate_json(call.function.arguments)


def test_the_llm_command(base_url, tmp_path):
    command = shutil.which("llm", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
    if command is None:
        pytest.skip("llm is not installed")
    model = f"- model_id: ours\n  model_name: {MODEL}\n  api_base: {base_url}\n  can_stream: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(model)
    environ = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    for options in ([], ["--no-stream"]):
        arguments = [command, "-m", "ours", "-o", "temperature", "0", "-o", "max_tokens", "12", *options, QUESTION]
        result = subprocess.run(arguments, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert (result.returncode, bool(result.stdout.strip())) == (0, True), result.stderr
