"""Completions over WSGI: the forms of a prompt, echo and scores, the best of several, streams that equal whole answers."""

import json
import math

import pytest

from tests.api.conftest import MODEL
from tests.fakes import babble, scores_of

COMPLETIONS = "/v1/completions"


@pytest.fixture
def complete(served):
    def complete(prompt="Hello", headers=None, **parameters):
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0} | parameters
        return served.client.post(COMPLETIONS, json=body, headers=headers, buffered=True)

    return complete


def greedy(prompt, number):
    held = [*prompt]
    for _ in range(number):
        held.append(babble(held))
    return bytes(held[len(prompt) :]).decode()


def events(response):
    assert response.text.endswith("data: [DONE]\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n")[:-2]]


def assembled(chunks):
    """The choices of a stream as a whole answer has them."""
    choices = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"index": part["index"], "text": "", "logprobs": None})
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                choice["logprobs"] = choice["logprobs"] or {name: [] for name in part["logprobs"]}
                for name, values in part["logprobs"].items():
                    choice["logprobs"][name] += values
    return [choices[index] for index in sorted(choices)]


def test_a_completion_has_every_key_and_no_markup(complete):
    answer = complete().json
    assert (answer["object"], answer["model"], answer["id"][:5]) == ("text_completion", MODEL, "cmpl-")
    assert answer["choices"] == [{"index": 0, "text": greedy(b"Hello", 4), "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("prompt", ["Hello", ["Hello"], [*b"Hello"], [[*b"Hello"]]])
def test_the_four_forms_of_a_prompt_are_one(complete, prompt):
    assert complete(prompt).json["choices"][0]["text"] == greedy(b"Hello", 4)
    assert complete(prompt, echo=True).json["choices"][0]["text"] == "Hello" + greedy(b"Hello", 4)


def test_no_prompt_is_the_start_of_a_text(complete):
    assert [complete(prompt).json["usage"]["prompt_tokens"] for prompt in (None, "", [""])] == [1, 1, 1]


def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(complete):
    answer = complete(["one", "two", "three"], n=2).json
    expected = [greedy(text.encode(), 4) for text in ("one", "two", "three") for _ in range(2)]
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [*enumerate(expected)]
    assert answer["usage"]["prompt_tokens"] == 3 + 3 + 5
    assert answer["usage"]["completion_tokens"] == 6 * 4


def test_more_prompts_than_the_queue_has_room_for_wait_for_each_other(complete):
    prompts = [f"number {number}" for number in range(50)]
    texts = [choice["text"] for choice in complete(prompts).json["choices"]]
    assert texts == [greedy(prompt.encode(), 4) for prompt in prompts]


def test_sixteen_tokens_are_made_unless_said_otherwise(complete):
    assert complete(max_tokens=None).json["usage"]["completion_tokens"] == 16
    assert complete("x" * 250, max_tokens=None).json["usage"]["completion_tokens"] == 6


def test_a_prompt_is_scored_without_an_answer(complete):
    answer = complete("Hello", max_tokens=0, echo=True, logprobs=1).json
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("Hello", "length", 0)
    scores = choice["logprobs"]
    assert scores["tokens"] == [*"Hello"]
    assert scores["text_offset"] == [0, 1, 2, 3, 4]
    assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
    for position in range(1, 5):
        row = scores_of(babble([*b"Hello"[:position]])).astype(float)
        norm = math.log(sum(math.exp(value) for value in row))
        assert scores["token_logprobs"][position] == pytest.approx(row[b"Hello"[position]] - norm, abs=1e-5)
        assert "Hello"[position] in scores["top_logprobs"][position]


def test_offsets_go_on_behind_the_prompt(complete):
    assert complete("Hello", logprobs=0).json["choices"][0]["logprobs"]["text_offset"] == [5, 6, 7, 8]
    echoed = complete("Hello", logprobs=0, echo=True).json["choices"][0]["logprobs"]
    assert echoed["text_offset"] == [*range(9)]
    assert len(echoed["tokens"]) == len(echoed["token_logprobs"]) == len(echoed["top_logprobs"]) == 9


def test_bytes_that_are_no_text_are_named(complete):
    tokens = complete("é", max_tokens=0, echo=True, logprobs=0).json["choices"][0]["logprobs"]["tokens"]
    assert tokens == [r"bytes:\xc3", r"bytes:\xa9"]


def test_the_best_of_several_are_shown(complete):
    answer = complete(temperature=1.5, seed=1, n=2, best_of=6, logprobs=0).json
    every = complete(temperature=1.5, seed=1, n=6, logprobs=0).json
    means = sorted((sum(choice["logprobs"]["token_logprobs"]) for choice in every["choices"]), reverse=True)
    assert [sum(choice["logprobs"]["token_logprobs"]) for choice in answer["choices"]] == means[:2]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 24
    assert complete(best_of=2).json["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"echo": True},
        {"echo": True, "logprobs": 2},
        {"echo": True, "logprobs": 2, "n": 2, "max_tokens": 0},
        {"prompt": [[1, 2, 3], [4, 5]], "echo": True, "n": 2},
        {"prompt": ["a", "b"], "n": 2, "logprobs": 1, "echo": True},
        {"stop": ["a", "e", "i"], "logprobs": 0, "max_tokens": 30},
        {"regex": "[a-c]{3}", "logprobs": 0},
    ],
)
def test_a_stream_equals_the_whole_answer(complete, parameters):
    whole = complete(temperature=1.3, seed=9, **parameters).json
    stream = complete(
        temperature=1.3,
        seed=9,
        stream=True,
        stream_options={"include_usage": True},
        headers={"Cache-Control": "no-cache"},
        **parameters,
    )
    *chunks, last = events(stream)
    assert [choice | {"logprobs": choice["logprobs"] or None} for choice in assembled(chunks)] == whole["choices"]
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], whole["usage"]["total_tokens"])
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_each_prompt_of_a_determined_request_is_remembered(complete):
    assert complete("one").headers["X-Cache"] == "miss"
    assert complete(["one", "two"]).headers["X-Cache"] == "miss"
    assert complete(["two", "one"]).headers["X-Cache"] == "hit"
    assert complete("one", echo=True).headers["X-Cache"] == "miss"


@pytest.mark.parametrize(
    ("parameters", "code", "param"),
    [
        ({"prompt": []}, "empty_array", "prompt"),
        ({"prompt": [[]]}, "empty_array", "prompt[0]"),
        ({"prompt": {}}, "invalid_type", "prompt"),
        ({"prompt": 1}, "invalid_type", "prompt"),
        ({"prompt": [1, "a"]}, "invalid_type", "prompt[1]"),
        ({"prompt": ["a", True]}, "invalid_type", "prompt[1]"),
        ({"prompt": [[1, None]]}, "invalid_type", "prompt[0][1]"),
        ({"prompt": [260]}, "invalid_value", "prompt"),
        ({"prompt": ["a", [-1]]}, "integer_below_min_value", "prompt[1][0]"),
        ({"prompt": "a" * 257}, "context_length_exceeded", "prompt"),
        ({"prompt": ["a", "a" * 253]}, "context_length_exceeded", "prompt"),
        ({"max_tokens": -1}, "integer_below_min_value", "max_tokens"),
        ({"logprobs": 6}, "integer_above_max_value", "logprobs"),
        ({"logprobs": True}, "invalid_type", "logprobs"),
        ({"best_of": 21}, "integer_above_max_value", "best_of"),
        ({"best_of": 1, "n": 2}, "invalid_value", "best_of"),
        ({"best_of": 2, "stream": True}, "invalid_value", "best_of"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"echo": 1}, "invalid_type", "echo"),
        ({"regex": "("}, "invalid_grammar", "regex"),
        ({"stream_options": {}}, None, "stream_options"),
        ({"regex": "a", "choice": ["b"]}, "invalid_value", "choice"),
    ],
)
def test_mistakes_are_named(complete, parameters, code, param):
    response = complete(**{"prompt": "Hello"} | parameters)
    error = response.json["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param), error["message"]


def test_unknown_fields_are_named_or_refused(serve):
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 1, "nonsense": 1}
    assert serve().client.post(COMPLETIONS, json=body, buffered=True).headers["X-LLMServe-Ignored"] == "nonsense"
    response = serve(strict=True).client.post(COMPLETIONS, json=body)
    assert (response.status_code, response.json["error"]["code"]) == (400, "unknown_parameter")
    assert response.json["error"]["param"] == "nonsense"
