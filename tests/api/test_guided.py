"""Chats whose parameters decide on the tokens: grammars, biases, ends, and the scores that tell of them."""

import json
import math

import pytest

from tests.api.test_chat import content, events
from tests.fakes import EOS, babble, say, scores_of

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}


def reason(response):
    return response.json["choices"][0]["finish_reason"]


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_is_what_its_schema_says(served, temperature):
    for seed in range(5):
        response = served.chat(response_format=FORMAT, temperature=temperature, seed=seed, max_tokens=200)
        thing = json.loads(content(response))
        assert thing["colour"] in ("red", "blue")
        assert 1 <= thing["count"] <= 9
        assert [*thing] == ["colour", "count"]
        assert reason(response) == "stop"


def test_a_cut_answer_says_so(served):
    response = served.chat(response_format=FORMAT, temperature=0, max_tokens=3)
    assert reason(response) == "length"


@pytest.mark.parametrize(("others", "ended"), [({}, "stop"), ({"additionalProperties": True}, "length")])
def test_members_are_not_made_up_unless_the_schema_asks_for_them(served, others, ended):
    """A model that would write members for ever: to close an object is the last that it wants."""
    schema = {key: value for key, value in SCHEMA.items() if key != "additionalProperties"} | others
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    response = served.chat(
        response_format=form, temperature=0, max_tokens=100, logit_bias={str(byte): -100 for byte in b"} \n\t"}
    )
    assert reason(response) == ended


def test_a_json_object_is_one(served):
    response = served.chat(
        response_format={"type": "json_object"}, temperature=0, max_tokens=200, logit_bias={str(ord("}")): 100}
    )
    assert isinstance(json.loads(content(response)), dict)


def test_other_guides(served):
    assert content(served.chat(regex="[0-9]{3}-[a-c]", temperature=0))[3] == "-"
    assert content(served.chat(choice=["yes", 'no "way"', "ü\n"], temperature=0)) in ("yes", 'no "way"', "ü\n")
    assert content(served.chat(grammar='start: "x" middle "z"\nmiddle: "y"*', temperature=0, max_tokens=5)).startswith("x")


def test_the_key_of_the_response_cache_holds_the_guide(served):
    assert served.chat(regex="a", temperature=0).headers["X-Cache"] == "miss"
    assert served.chat(regex="b", temperature=0).headers["X-Cache"] == "miss"
    assert served.chat(regex="a", temperature=0).headers["X-Cache"] == "hit"


@pytest.mark.parametrize(
    "changes",
    [
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 1},
        {"logit_bias": {"97": 1}},
        {"min_tokens": 1},
        {"ignore_eos": True},
        {"stop_token_ids": [97]},
        {"response_format": FORMAT},
        {"choice": ["a"]},
        {"chat_template_kwargs": {"a": 1}},
        {"reasoning_effort": "low"},
        {"add_generation_prompt": False},
    ],
)
def test_what_shapes_the_answer_is_in_the_key(served, changes):
    served.chat(temperature=0, max_tokens=5)
    assert served.chat(temperature=0, max_tokens=5, **changes).headers["X-Cache"] == "miss"
    assert served.chat(temperature=0, max_tokens=5, **changes).headers["X-Cache"] == "hit"


def test_a_bias_of_a_hundred_decides(served):
    assert content(served.chat(temperature=0, max_tokens=3, logit_bias={"122": 100})) == "zzz"
    banned = {str(babble([])): -100}
    assert chr(babble([])) not in content(served.chat(temperature=0, max_tokens=20, logit_bias=banned))


def test_an_answer_has_at_least_so_many_tokens(serve):
    served = serve(say("yes"))
    assert content(served.chat(temperature=0)) == "yes"
    longer = served.chat(temperature=0, min_tokens=6, max_tokens=9, stop=["e"])
    assert longer.json["usage"]["completion_tokens"] >= 6
    forever = served.chat(temperature=0, ignore_eos=True, max_tokens=9)
    assert (forever.json["usage"]["completion_tokens"], reason(forever)) == (9, "length")


def test_a_stop_token_is_no_part_of_the_answer(serve):
    response = serve(say("yes, no")).chat(temperature=0, stop_token_ids=[ord(","), EOS])
    assert (content(response), reason(response), response.json["usage"]["completion_tokens"]) == ("yes", "stop", 3)


def test_logprobs_are_of_the_models_own_distribution(serve):
    response = serve(say("hé")).chat(
        temperature=0.3, seed=1, logprobs=True, top_logprobs=2, logit_bias={"120": -50}, choice=["hé"]
    )
    scores = response.json["choices"][0]["logprobs"]
    assert scores["refusal"] is None
    assert [entry["bytes"] for entry in scores["content"]] == [[byte] for byte in "hé".encode()]
    assert [entry["token"] for entry in scores["content"]] == ["h", "\ufffd", "\ufffd"]
    row = scores_of(ord("h")).astype(float)
    assert scores["content"][0]["logprob"] == pytest.approx(10 + 1 - math.log(sum(map(math.exp, row))), abs=1e-5)
    assert [len(entry["top_logprobs"]) for entry in scores["content"]] == [2, 2, 2]
    assert scores["content"][0]["top_logprobs"][0] == {key: scores["content"][0][key] for key in ("token", "logprob", "bytes")}


def test_alternatives_are_empty_unless_asked_for(served):
    (entry,) = served.chat(max_tokens=1, logprobs=True).json["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"] == []


@pytest.mark.parametrize("parameters", [{}, {"stop": ["a", "ee"]}, {"n": 3}, {"regex": "(é|[a-f])*z"}, {"top_logprobs": 3}])
def test_a_stream_has_the_logprobs_of_the_whole_answer(served, parameters):
    options = {"temperature": 1.4, "seed": 4, "logprobs": True, "max_tokens": 40} | parameters
    whole = served.chat(**options).json["choices"]
    chunks = events(served.chat(**options, stream=True, headers={"Cache-Control": "no-store"}))
    for choice in whole:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]] == choice["logprobs"][
            "content"
        ]
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == choice["message"]["content"]
        assert (
            bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"]).decode(errors="replace") == text
        )


class TestWhatTheTemplateIsTold:
    TEMPLATE = (
        "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] }}<end>{% endfor %}{{ mood }}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
    )

    def prompt(self, serve, **parameters):
        served = serve(template=self.TEMPLATE)
        served.chat(temperature=0, max_tokens=1, **parameters)
        return bytes(token_id for token_id in served.backend.held if token_id < 256).decode()

    def test_a_final_message_is_continued(self, serve):
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well, "}]
        assert self.prompt(serve, messages=messages, continue_final_message=True) == "user\nHelloassistant\nWell, "

    def test_variables_reach_it(self, serve):
        assert self.prompt(serve, chat_template_kwargs={"mood": "(gay)"}) == "user\nHello(gay)assistant\n"

    @pytest.mark.parametrize(
        ("effort", "shown"), [("high", "(high)"), ("none", "(none)(off)"), (None, ""), ("low", "(low)")], ids=str
    )
    def test_reasoning_is_switched_where_it_has_a_switch(self, serve, effort, shown):
        switch = "{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
        served = serve(template=self.TEMPLATE + switch + "{% if enable_thinking is false %}(off){% endif %}")
        served.chat(temperature=0, max_tokens=1, reasoning_effort=effort)
        prompt = bytes(token_id for token_id in served.backend.held if token_id < 256).decode()
        assert prompt == "user\nHelloassistant\n" + shown

    def test_a_generation_prompt_can_be_left_out(self, serve):
        assert self.prompt(serve, add_generation_prompt=False) == "user\nHello"
