"""The official Python client: what decides on an answer's tokens and tells of them, on every engine."""

from __future__ import annotations

import json
import math
import random
import re
from enum import Enum
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.conftest import INFILL, MODEL

MESSAGES = [{"role": "user", "content": "Tell me about a small town by the sea."}]
FRESH = {"Cache-Control": "no-store"}
SHORT = {"max_tokens": 24, "temperature": 0.8, "seed": 11}


def ask(client, **options):
    return client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "extra_headers": FRESH} | SHORT | options)


def ask_streaming(client, **options):
    """(texts, finish reasons, logprobs of each choice, usage) of a stream, whose form is checked on the way."""
    texts, reasons, logprobs, usage, seen = {}, {}, {}, None, []
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **options):
        assert usage is None, "a chunk behind the usage"
        usage = chunk.usage
        for choice in chunk.choices:
            if choice.index not in seen:
                assert (choice.index, choice.delta.role) == (len(seen), "assistant"), "roles come first and in order"
                seen.append(choice.index)
            assert choice.index not in reasons, "a chunk behind the finish reason"
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.logprobs is not None:
                part = choice.logprobs.content
                assert bytes(byte for entry in part for byte in entry.bytes).decode(errors="replace") == choice.delta.content
                logprobs.setdefault(choice.index, []).extend(part)
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, logprobs, usage


def parses(text, schema):
    jsonschema.validate(json.loads(text), schema)
    return True


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["village", "town", "city"]},
        "people": {"type": "integer", "minimum": 0, "maximum": 5000},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
        "mayor": {"anyOf": [{"type": "string", "maxLength": 8}, {"type": "null"}]},
    },
    "required": ["name", "kind", "people", "tags", "mayor"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "pattern": "^[a-z]{2,6}$"}},
}
STRICT = {"type": "json_schema", "json_schema": {"name": "town", "strict": True, "schema": SCHEMA}}
LOOSE = {"type": "json_schema", "json_schema": {"name": "day", "schema": {"type": "string", "format": "date"}}}

# what is asked for, and what must be true of each answer's text and finish reason
CHECKS = {
    "temperature 0": ({"temperature": 0}, lambda text, reason: text),
    "temperature 2": ({"temperature": 2}, lambda text, reason: text),
    "top_p 0": ({"top_p": 0}, lambda text, reason: text),
    "max_tokens": ({"max_tokens": 3}, lambda text, reason: reason == "length"),
    "max_completion_tokens": ({"max_completion_tokens": 2}, lambda text, reason: reason == "length"),
    "n": ({"n": 3}, lambda text, reason: text),
    "seed of 63 bits": ({"seed": 2**63 - 1}, lambda text, reason: text),
    "negative seed": ({"seed": -5}, lambda text, reason: text),
    "one stop string": ({"stop": "e"}, lambda text, reason: "e" not in text),
    "16 stop strings": ({"stop": [chr(97 + i) for i in range(16)]}, lambda text, reason: not re.search("[a-p]", text)),
    "penalties": ({"presence_penalty": 1.5, "frequency_penalty": 1}, lambda text, reason: text),
    "negative penalties": ({"presence_penalty": -1, "frequency_penalty": -0.5}, lambda text, reason: text),
    "a ban": ({"logit_bias": {str(i): -100 for i in range(300)}}, lambda text, reason: text),
    "logprobs": ({"logprobs": True, "top_logprobs": 3}, lambda text, reason: text),
    "json_object": (
        {"response_format": {"type": "json_object"}, "max_tokens": 300},
        lambda text, reason: reason == "length" or isinstance(json.loads(text), dict),
    ),
    "json_schema": (
        {"response_format": STRICT, "max_tokens": 200, "temperature": 1.5},
        lambda text, reason: reason == "stop" and parses(text, SCHEMA),
    ),
    "json_schema, not strict": (
        {"response_format": LOOSE, "max_tokens": 50},
        lambda text, reason: re.fullmatch(r'\s*"\d{4}-\d\d-\d\d"', text),
    ),
    "a grammar that is cut": ({"response_format": STRICT, "max_tokens": 5}, lambda text, reason: reason == "length"),
    "text format": ({"response_format": {"type": "text"}}, lambda text, reason: text),
    "top_k": ({"extra_body": {"top_k": 1}}, lambda text, reason: text),
    "min_p": ({"extra_body": {"min_p": 0.2}}, lambda text, reason: text),
    "repetition_penalty": ({"extra_body": {"repetition_penalty": 1.3}}, lambda text, reason: text),
    "min_tokens": ({"extra_body": {"min_tokens": 20}, "stop": ["e"]}, lambda text, reason: len(text) > 20),
    "ignore_eos": ({"extra_body": {"ignore_eos": True}, "max_tokens": 60}, lambda text, reason: reason == "length"),
    "regex": ({"extra_body": {"regex": "[0-9]{3}-[0-9]{4}"}}, lambda text, reason: re.fullmatch("[0-9]{3}-[0-9]{4}", text)),
    "choice": ({"extra_body": {"choice": ["red", "green"]}}, lambda text, reason: text in ("red", "green")),
    "grammar": (
        {"extra_body": {"grammar": 'start: "yes" | "no" ", " /[a-z]{4}/'}},
        lambda text, reason: re.fullmatch("yes|no, [a-z]{4}", text),
    ),
    "template variables": ({"extra_body": {"chat_template_kwargs": {"x": 1}}}, lambda text, reason: text),
    "passive": (
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "verbosity": "low"},
        lambda text, reason: text,
    ),
    "nulls": ({"stop": None, "n": None, "logit_bias": None, "tools": None, "response_format": None}, lambda text, reason: text),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_parameter_is_honoured_whole_and_streamed_alike(client, name):
    options, holds = CHECKS[name]
    whole = ask(client, **options)
    texts, reasons, logprobs, usage = ask_streaming(client, **options)
    assert usage == whole.usage or usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        assert holds(choice.message.content, choice.finish_reason), (choice.finish_reason, choice.message.content)
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == choice.finish_reason
        assert (choice.logprobs is None) == (choice.index not in logprobs)


def test_logprobs_are_complete_and_exact(client):
    choice = ask(client, logprobs=True, top_logprobs=20, temperature=0).choices[0]
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 20
        assert entry.logprob == entry.top_logprobs[0].logprob
        values = [each.logprob for each in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert 0.2 < sum(map(math.exp, values)) <= 1.0001


def random_options(seed):
    """A request that any of the parameters may shape."""
    rng = random.Random(seed)
    options = {
        "seed": rng.choice([seed, -seed, 2**63 - 1 - seed]),
        "max_tokens": rng.randrange(2, 20),
        "temperature": rng.choice([0, 0.5, 1, 1.7]),
        "top_p": rng.choice([0.3, 0.9, 1]),
        "n": rng.choice([1, 1, 2]),
        "frequency_penalty": rng.choice([0, 0.7]),
        "presence_penalty": rng.choice([0, -0.4]),
        "stop": rng.choice([None, ["a"], [" the", "."]]),
        "logprobs": rng.random() < 0.7,
        "logit_bias": rng.choice([{}, {"28": -100, "260": 2}]),
        "extra_body": rng.choice(
            [{}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}, {"regex": "[a-z ]{1,30}"}, {"min_tokens": 2}]
        ),
    }
    if options["logprobs"]:
        options["top_logprobs"] = rng.choice([0, 2, 5])
    if "regex" not in options["extra_body"]:
        options["response_format"] = rng.choice([None, None, {"type": "text"}, STRICT, {"type": "json_object"}])
    return options


@pytest.mark.parametrize("seed", range(50))
def test_a_stream_is_the_answer_whatever_the_parameters(client, seed):
    """Fifty random sets of them: text, log-probabilities to the last bit, finish reason and usage."""
    options = random_options(seed)
    whole = ask(client, **options)
    texts, reasons, logprobs, usage = ask_streaming(client, **options)
    assert counts(usage) == counts(whole.usage)
    assert len(texts) == len(whole.choices) == options["n"]
    for choice in whole.choices:
        assert (texts[choice.index], reasons[choice.index]) == (choice.message.content, choice.finish_reason)
        assert logprobs.get(choice.index, []) == (choice.logprobs.content if choice.logprobs else [])
        assert bool(choice.logprobs) == options["logprobs"]


def counts(usage):
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Boat(BaseModel):
    kind: Literal["boat"]
    metres: int = Field(ge=1, le=40)


class House(BaseModel):
    kind: Literal["house"]
    rooms: int = Field(ge=1, le=9)


class Owner(BaseModel):
    name: str = Field(max_length=10)
    colour: Colour
    nickname: str | None = Field(max_length=6)
    things: list[Boat | House] = Field(max_length=2)
    born: str = Field(pattern=r"^\d{4}$")


def test_a_pydantic_model_is_parsed(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Owner, max_tokens=400, temperature=1, seed=3
    )
    assert isinstance(answer.choices[0].message.parsed, Owner)


def test_the_stream_helper_parses_too(client):
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=House, max_tokens=200, temperature=1, seed=3
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, House)
    assert {"content.delta", "content.done"} <= kinds


def test_a_final_message_is_continued(client):
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two, three,"}]
    text = ask(client, messages=messages, temperature=0, extra_body={"continue_final_message": True}).choices[0].message.content
    assert text.lstrip().startswith("four")


BAD = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, "invalid_grammar"),
    ({"response_format": {"type": "xml"}}, "invalid_value"),
    ({"extra_body": {"regex": "("}}, "invalid_grammar"),
    ({"extra_body": {"regex": "a", "choice": ["b"]}}, "invalid_value"),
    ({"logit_bias": {"999999": 1}}, "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value"),
]


@pytest.mark.parametrize(("options", "code"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_known_before_the_first_header(client, options, code, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, stream=stream, **options)
    assert caught.value.code == code
    assert caught.value.param


# Completions.

TEXT = "The quick brown fox jumps over the lazy"
COMPLETIONS = {
    "plain": ({}, lambda choice: choice.text),
    "echo": ({"echo": True}, lambda choice: choice.text.startswith(TEXT)),
    "several prompts": ({"prompt": [TEXT, "One, two,"], "n": 2}, lambda choice: choice.text),
    "token ids": ({"prompt": [504, 2365, 6354]}, lambda choice: choice.text),
    "lists of token ids": ({"prompt": [[504, 2365], [6354]], "echo": True}, lambda choice: choice.text),
    "logprobs": ({"logprobs": 5}, lambda choice: len(choice.logprobs.tokens) == len(choice.logprobs.text_offset)),
    "echo and logprobs": ({"logprobs": 2, "echo": True}, lambda choice: "".join(choice.logprobs.tokens) == choice.text),
    "only scores": ({"logprobs": 1, "echo": True, "max_tokens": 0}, lambda choice: choice.text == TEXT),
    "stop": ({"stop": [".", "\n"], "max_tokens": 40}, lambda choice: "." not in choice.text),
    "regex": ({"extra_body": {"regex": " [a-z]+"}, "max_tokens": 8}, lambda choice: re.fullmatch("( [a-z]*)?", choice.text)),
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions_whole_and_streamed_alike(client, name):
    options, holds = COMPLETIONS[name]
    options = {"model": MODEL, "prompt": TEXT, "max_tokens": 8, "temperature": 0.7, "seed": 2, "extra_headers": FRESH} | options
    whole = client.completions.create(**options)
    texts, reasons = {}, {}
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
    assert [choice.index for choice in whole.choices] == [*range(len(whole.choices))]
    for choice in whole.choices:
        assert holds(choice), choice
        assert (texts[choice.index], reasons[choice.index]) == (choice.text, choice.finish_reason)


def test_the_best_of_several(client):
    answer = client.completions.create(
        model=MODEL, prompt=TEXT, best_of=4, n=2, max_tokens=6, temperature=1.2, seed=1, logprobs=0
    )
    first, second = (sum(choice.logprobs.token_logprobs) for choice in answer.choices)
    assert first >= second
    assert answer.usage.completion_tokens > 12


def test_the_likely_word_scores_higher(client):
    def score(word):
        answer = client.completions.create(model=MODEL, prompt=f"{TEXT} {word}", max_tokens=0, echo=True, logprobs=1)
        return answer.choices[0].logprobs.token_logprobs[-1]

    assert score("dog") > score("moon") + 1


def test_a_gap_is_filled_by_a_model_that_can(client):
    gap = {"model": INFILL, "prompt": "the river", "suffix": " to sea", "max_tokens": 4, "temperature": 0}
    filled, ends = client.completions.create(**gap), client.completions.create(**gap | {"suffix": " world"})
    assert filled.choices[0].text
    assert filled.usage.prompt_tokens > ends.usage.prompt_tokens  # the suffix is in the prompt
    plain = client.completions.create(**gap | {"suffix": None})
    assert plain.choices[0].text != filled.choices[0].text
    streamed = client.completions.create(**gap, stream=True)
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == filled.choices[0].text


def test_a_gap_is_refused_by_a_model_that_cannot(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="def add(a, b):\n    return ", suffix="\n", max_tokens=4)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "suffix")
