import json

import pytest

from llmserve.api.schema import ChatRequest, parse_chat, parse_json
from llmserve.engine.generation import SamplingParams
from llmserve.errors import InvalidRequest


def parse(**parameters) -> ChatRequest:
    chat, ignored = parse_chat({"model": "m", "messages": [{"role": "user", "content": "hi"}]} | parameters)
    assert ignored == []
    return chat


def for_template(*messages):
    return [message.for_template() for message in parse(messages=list(messages)).messages]


class TestJSON:
    @pytest.mark.parametrize("text", ['{"a": "\\ud83d\\ude00"}', "[1e400, -0.0, 12345678901234567890]", '"\\u0000"'])
    def test_odd_but_right_json_is_read(self, text):
        assert parse_json(text) == json.loads(text)

    @pytest.mark.parametrize(
        "text",
        ["", "{", "NaN", "[Infinity]", '"\\ud800"', '{"\\udc00": 1}', "[" * 65 + "]" * 65, "[" * 10**5, "1" * 5000, "\ufeff{}"],
    )
    def test_json_that_nothing_could_work_with_is_refused(self, text):
        with pytest.raises(ValueError):
            parse_json(text)

    def test_what_is_broad_is_not_deep(self):
        text = json.dumps([[[]]] * 1000)
        assert len(parse_json(text)) == 1000


class TestParameters:
    def test_the_defaults_are_openais(self):
        chat = parse()
        assert chat.sampling == SamplingParams()
        assert (chat.n, chat.stream, chat.stop_strings, chat.token_limit, chat.include_usage) == (1, False, (), None, False)

    def test_null_is_the_default_everywhere(self):
        nulls = dict.fromkeys(set(ChatRequest.declared) - {"model", "messages"})
        assert parse(**nulls) == parse()

    def test_sampling_parameters_reach_the_sampler(self):
        given = {
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 7,
            "min_p": 0.125,
            "presence_penalty": -2,
            "frequency_penalty": 2,
            "repetition_penalty": 1.5,
            "seed": -(2**63),
        }
        assert parse(**given).sampling == SamplingParams(**given)

    def test_minus_one_turns_top_k_off_as_elsewhere(self):
        assert parse(top_k=-1).sampling.top_k == 0

    def test_the_newer_name_of_the_token_limit_wins(self):
        assert parse(max_tokens=5).token_limit == 5
        assert parse(max_tokens=5, max_completion_tokens=7).token_limit == 7

    @pytest.mark.parametrize(("stop", "strings"), [("a", ("a",)), (["a", "b"], ("a", "b")), ([], ())])
    def test_stop_is_a_string_or_several(self, stop, strings):
        assert parse(stop=stop).stop_strings == strings

    def test_usage_in_a_stream_is_asked_for(self):
        assert parse(stream=True, stream_options={"include_usage": True}).include_usage
        assert not parse(stream=True, stream_options={}).include_usage

    @pytest.mark.parametrize(
        "harmless",
        [
            {"logprobs": False},
            {"top_logprobs": 0},
            {"logit_bias": {}},
            {"response_format": {"type": "text"}},
            {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
            {"tool_choice": "none", "functions": [], "function_call": "none"},
            {"modalities": ["text"]},
        ],
    )
    def test_what_asks_for_nothing_is_taken(self, harmless):
        assert parse(**harmless).shape == parse().shape

    def test_passive_parameters_are_taken(self):
        parse(
            user="u",
            safety_identifier="s",
            prompt_cache_key="k",
            prompt_cache_retention="24h",
            prompt_cache_options={"mode": "x"},
            metadata={"k": "v"},
            store=True,
            service_tier="flex",
            prediction={"type": "content", "content": "x"},
            reasoning_effort="low",
            verbosity="high",
        )

    def test_without_a_model_the_words_are_openais(self):
        with pytest.raises(InvalidRequest) as caught:
            parse_chat({"messages": []})
        assert (caught.value.message, caught.value.param, caught.value.code) == (
            "you must provide a model parameter",
            None,
            None,
        )

    def test_unknown_fields_are_told_wherever_they_are(self):
        message = {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}], "weight": 1}
        _, ignored = parse_chat(
            {"model": "m", "messages": [message], "mirostat": 2, "stream": True, "stream_options": {"x": 1}}
        )
        assert ignored == ["messages[0].content[0].cache_control", "messages[0].weight", "mirostat", "stream_options.x"]


class TestMessages:
    def test_a_developer_is_the_system(self):
        assert for_template({"role": "developer", "content": "x"}) == [{"role": "system", "content": "x"}]

    def test_parts_become_one_text(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert for_template({"role": "user", "content": parts})[0]["content"] == "a\nb"

    @pytest.mark.parametrize("role", ["system", "user", "assistant"])
    def test_null_content_is_empty(self, role):
        assert for_template({"role": role, "content": None}) == [{"role": role, "content": ""}]

    def test_an_assistant_may_have_said_nothing_or_refused(self):
        said = for_template({"role": "assistant"}, {"role": "assistant", "content": None, "refusal": "No."})
        assert [message["content"] for message in said] == ["", "No."]
        parts = [{"type": "refusal", "refusal": "Never."}]
        assert for_template({"role": "assistant", "content": parts})[0]["content"] == "Never."

    def test_names_reach_the_template(self):
        assert for_template({"role": "user", "content": "x", "name": "Ann"})[0]["name"] == "Ann"

    def test_a_tools_answer_names_its_call(self):
        message = {"role": "tool", "content": "4", "tool_call_id": "call_1"}
        assert for_template(message) == [message]

    @pytest.mark.parametrize(
        ("arguments", "rendered"),
        [
            ('{"x": [1, {"y": null}]}', {"x": [1, {"y": None}]}),
            ("not JSON", "not JSON"),
            ("[1]", "[1]"),
            ('{"x": NaN}', '{"x": NaN}'),
            ('{"x": "\\ud800"}', '{"x": "\\ud800"}'),
            ('{"x":' * 100 + "1" + "}" * 100, '{"x":' * 100 + "1" + "}" * 100),
        ],
    )
    def test_a_calls_arguments_are_the_object_they_spell_or_text(self, arguments, rendered):
        call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        (message,) = for_template({"role": "assistant", "content": None, "tool_calls": [call]})
        assert message["tool_calls"] == [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": rendered}}]

    def test_an_answer_of_the_official_client_can_be_sent_back(self):
        dumped = {
            "role": "assistant",
            "content": "hi",
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        }
        assert for_template(dumped) == [{"role": "assistant", "content": "hi"}]
