"""Whatever a client sends wrong: its status, code and param, and that the next client does not notice."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from io import BytesIO

import pytest

from llmserve.api.schema import ChatRequest
from llmserve.config import RESERVED_THREADS
from tests.api.conftest import CHAT, MODEL, chat_body, serving
from tests.fakes import say

KEY = "sk-right"
FINE = "All is well."
MAX_BODY_SIZE = 40_000
CONTEXT_LENGTH = 256
NUM_TEMPLATE_TOKENS = len("^user\n$^assistant\n")  # around one message in the fake's template; ^ and $ are control tokens
MODEL_URL = f"/v1/models/{MODEL}"


@dataclass(frozen=True, slots=True)
class Case:
    """A request, as `werkzeug.test.Client.open` takes it, and what it gets."""

    status: int
    code: str | None = None
    param: str | None = None
    method: str = "POST"
    path: str = CHAT
    data: bytes = field(default_factory=lambda: encode(chat_body()))
    headers: dict[str, str] = field(default_factory=dict)
    environ: dict[str, object] = field(default_factory=dict)

    def send(self, client):
        return client.open(
            self.path,
            method=self.method,
            data=self.data,
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | self.headers,
            environ_overrides=self.environ,
            buffered=True,
        )


def encode(body):
    return json.dumps(body).encode()


def schema_format(**changes):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": {}} | changes}


def user(content):
    return {"role": "user", "content": content}


def calling(**call):
    whole = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return {"role": "assistant", "tool_calls": [whole | call]}


def chunked(stream):
    return {"wsgi.input": stream, "wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked", "CONTENT_LENGTH": ""}


class BrokenOff(BytesIO):
    """A body whose chunks are malformed, or whose client left: each server has exceptions of its own for that."""

    def read(self, size=-1):
        raise RuntimeError("invalid chunk size")

    readinto = read


PLAIN = encode(chat_body())
EVERY_TYPE = ["1", 1, 1.5, True, [], {}]


def all_but(*types):
    return [value for value in EVERY_TYPE if type(value) not in types]


BAD_BODIES = {
    "empty": b"",
    "white space": b" \r\n\t",
    "cut off": PLAIN[:-1],
    "null": b"null",
    "a number": b"1",
    "a string": b'"model"',
    "an array": b"[" + PLAIN + b"]",
    "two objects": PLAIN + PLAIN,
    "a form": b"model=fake&messages=hello",
    "a comma too many": PLAIN[:-1] + b",}",
    "single quotes": PLAIN.replace(b'"', b"'"),
    "a comment": b"// hello\n" + PLAIN,
    "keys without quotes": b"{model: 1}",
    "a number as a key": b"{1: 1}",
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": Infinity}',
    "-Infinity in a field nobody knows": PLAIN[:-1] + b', "x": -Infinity}',
    "an integer of 5,000 digits": PLAIN[:-1] + b', "seed": ' + b"9" * 5000 + b"}",
    "a hexadecimal number": b'{"seed": 0x10}',
    "a number with a leading zero": b'{"seed": 010}',
    "a line break in a string": b'{"model": "a\nb"}',
    "an unknown escape": rb'{"model": "\x41"}',
    "half a surrogate pair": rb'{"model": "\ud83d"}',
    "half a surrogate pair as a key": PLAIN[:-1] + rb', "\udc00": 1}',
    "invalid UTF-8": b'{"model": "\xff"}',
    "a character cut in two": '{"model": "é'.encode()[:-1],
    "Latin-1": '{"model": "é"}'.encode("latin-1"),
    "UTF-16": json.dumps(chat_body()).encode("utf-16"),
    "UTF-8 with a byte order mark": b"\xef\xbb\xbf" + PLAIN,
    "NUL bytes": b"\0" * 100,
    "gzip that does not say so": gzip.compress(PLAIN),
    "very deep arrays": b"[" * 30_000,
    "very deep objects": b'{"a":' * 7_000,
    "arrays deeper than allowed": PLAIN[:-1] + b', "x": ' + b"[" * 70 + b"]" * 70 + b"}",
    "objects deeper than allowed": PLAIN[:-1] + b', "x": ' + b'{"a":' * 70 + b"1" + b"}" * 71,
}

# parameter, bad values, code; and where it is not the parameter itself, what is named
BAD_VALUES = [
    ("model", all_but(str), "invalid_type"),
    ("messages", all_but(list), "invalid_type"),
    ("messages", [[]], "empty_array"),
    ("max_tokens", all_but(int), "invalid_type"),
    ("max_tokens", [1.0], "invalid_type"),
    ("max_tokens", [0, -1, -(10**4000)], "integer_below_min_value"),
    ("max_tokens", [2**31, 10**4000], "integer_above_max_value"),
    ("max_completion_tokens", all_but(int), "invalid_type"),
    ("max_completion_tokens", [0, -1], "integer_below_min_value"),
    ("max_completion_tokens", [2**31], "integer_above_max_value"),
    ("n", all_but(int), "invalid_type"),
    ("n", [0, -1], "integer_below_min_value"),
    ("n", [129, 10**30], "integer_above_max_value"),
    ("temperature", all_but(int, float), "invalid_type"),
    ("temperature", [-0.01, -(10**4000)], "decimal_below_min_value"),
    ("temperature", [2.01, 10**4000], "decimal_above_max_value"),
    ("top_p", all_but(int, float), "invalid_type"),
    ("top_p", [-0.01], "decimal_below_min_value"),
    ("top_p", [1.01], "decimal_above_max_value"),
    ("top_k", all_but(int), "invalid_type"),
    ("top_k", [-2], "integer_below_min_value"),
    ("top_k", [2**31], "integer_above_max_value"),
    ("min_p", all_but(int, float), "invalid_type"),
    ("min_p", [-0.01], "decimal_below_min_value"),
    ("min_p", [1.01], "decimal_above_max_value"),
    ("presence_penalty", all_but(int, float), "invalid_type"),
    ("presence_penalty", [-2.01], "decimal_below_min_value"),
    ("presence_penalty", [2.01], "decimal_above_max_value"),
    ("frequency_penalty", all_but(int, float), "invalid_type"),
    ("frequency_penalty", [-2.01], "decimal_below_min_value"),
    ("frequency_penalty", [2.01], "decimal_above_max_value"),
    ("repetition_penalty", all_but(int, float), "invalid_type"),
    ("repetition_penalty", [0, -1], "decimal_below_min_value"),
    ("repetition_penalty", [2.01], "decimal_above_max_value"),
    ("seed", all_but(int), "invalid_type"),
    ("seed", [-(2**63) - 1], "integer_below_min_value"),
    ("seed", [2**63], "integer_above_max_value"),
    ("stop", all_but(str, list), "invalid_type"),
    ("stop", [""], "empty_string"),
    ("stop", [["a"] * 17], "array_above_max_length"),
    ("stop", [["a", 1], ["a", None]], "invalid_type", "stop[1]"),
    ("stop", [["a", ""]], "empty_string", "stop[1]"),
    ("stream", all_but(bool), "invalid_type"),
    ("stream_options", all_but(dict), "invalid_type"),
    ("stream_options", [{"include_usage": 1}], "invalid_type", "stream_options.include_usage"),
    ("stream_options", [{"include_obfuscation": "no"}], "invalid_type", "stream_options.include_obfuscation"),
    ("stream_options", [{}, {"include_usage": True}], None),  # without `stream`
    # passive: checked, then without effect
    ("user", all_but(str), "invalid_type"),
    ("safety_identifier", all_but(str), "invalid_type"),
    ("prompt_cache_key", all_but(str), "invalid_type"),
    ("prompt_cache_retention", all_but(str), "invalid_type"),
    ("prompt_cache_retention", ["", "1y"], "invalid_value"),
    ("prompt_cache_options", all_but(dict), "invalid_type"),
    ("metadata", all_but(dict), "invalid_type"),
    ("metadata", [{str(number): "" for number in range(17)}], "object_above_max_properties"),
    ("metadata", [{"k" * 65: ""}], "string_above_max_length"),
    ("metadata", [{"key": "v" * 513}], "string_above_max_length", "metadata.key"),
    ("metadata", [{"key": 1}, {"key": None}], "invalid_type", "metadata.key"),
    ("store", all_but(bool), "invalid_type"),
    ("service_tier", all_but(str), "invalid_type"),
    ("service_tier", ["gold"], "invalid_value"),
    ("prediction", all_but(dict), "invalid_type"),
    ("parallel_tool_calls", all_but(bool), "invalid_type"),
    ("reasoning_effort", all_but(str), "invalid_type"),
    ("reasoning_effort", ["", "HIGH"], "invalid_value"),
    ("verbosity", all_but(str), "invalid_type"),
    ("verbosity", ["chatty"], "invalid_value"),
    # known, and refused rather than dropped
    ("logprobs", all_but(bool), "invalid_type"),
    ("top_logprobs", all_but(int), "invalid_type"),
    ("top_logprobs", [21], "integer_above_max_value"),
    ("top_logprobs", [5], "invalid_value"),  # without `logprobs`
    ("logit_bias", all_but(dict), "invalid_type"),
    ("logit_bias", [{"a": 1}, {"-1": 1}, {"1.0": 1}, {"": 1}, {"9" * 10: 1}, {"260": 1}], "invalid_value"),
    ("logit_bias", [{"7": True}, {"7": "1"}, {"7": None}], "invalid_type", "logit_bias.7"),
    ("logit_bias", [{"7": -100.1}], "decimal_below_min_value", "logit_bias.7"),
    ("logit_bias", [{"7": 101}], "decimal_above_max_value", "logit_bias.7"),
    ("logit_bias", [{str(number): 1 for number in range(1025)}], "object_above_max_properties"),
    ("min_tokens", all_but(int), "invalid_type"),
    ("min_tokens", [-1], "integer_below_min_value"),
    ("min_tokens", [255], "invalid_value"),  # more than can be
    ("ignore_eos", all_but(bool), "invalid_type"),
    ("stop_token_ids", all_but(list), "invalid_type"),
    ("stop_token_ids", [["a"]], "invalid_type", "stop_token_ids[0]"),
    ("stop_token_ids", [[260]], "invalid_value"),
    ("stop_token_ids", [[1] * 65], "array_above_max_length"),
    ("regex", all_but(str), "invalid_type"),
    ("regex", ["("], "invalid_grammar"),
    ("choice", all_but(list), "invalid_type"),
    ("choice", [[]], "empty_array"),
    ("choice", [[""]], "empty_string", "choice[0]"),
    ("grammar", all_but(str), "invalid_type"),
    ("grammar", ["start: nothing"], "invalid_grammar"),
    ("add_generation_prompt", all_but(bool), "invalid_type"),
    ("continue_final_message", all_but(bool), "invalid_type"),
    ("continue_final_message", [True], "invalid_value"),  # the final message is a user's
    ("chat_template_kwargs", all_but(dict), "invalid_type"),
    ("chat_template_kwargs", [{"messages": []}, {"self": 1}, {"add_generation_prompt": False}], "invalid_value"),
    ("response_format", all_but(dict), "invalid_type"),
    ("response_format", [{}], "missing_required_parameter", "response_format.type"),
    ("response_format", [{"type": 1}], "invalid_type", "response_format.type"),
    ("response_format", [{"type": "object"}], "invalid_value", "response_format.type"),
    ("response_format", [{"type": "json_schema"}], "missing_required_parameter", "response_format.json_schema"),
    ("response_format", [schema_format(name=None)], "missing_required_parameter", "response_format.json_schema.name"),
    ("response_format", [schema_format(name="a b")], "invalid_value", "response_format.json_schema.name"),
    ("response_format", [schema_format(schema=[])], "invalid_type", "response_format.json_schema.schema"),
    ("response_format", [schema_format(schema={"type": "x"})], "invalid_grammar", "response_format.json_schema.schema"),
    (
        "response_format",
        [schema_format(schema={"properties": {"a": {"items": {"not": {}}}}})],
        "invalid_grammar",
        "response_format.json_schema.schema.properties.a.items",
    ),
    ("tools", all_but(list), "invalid_type"),
    ("tools", [[1]], "invalid_type", "tools[0]"),
    ("tools", [[{"function": {"name": "f"}}]], "missing_required_parameter", "tools[0].type"),
    ("tools", [[{"type": "web_search"}]], "invalid_value", "tools[0].type"),
    ("tools", [[{"type": "custom", "custom": {"name": "f"}}]], "unsupported_parameter", "tools[0]"),
    ("tools", [[{"type": "function"}]], "missing_required_parameter", "tools[0].function"),
    ("tools", [[{"type": "function", "function": {}}]], "missing_required_parameter", "tools[0].function.name"),
    ("tools", [[{"type": "function", "function": {"name": "a b"}}]], "invalid_value", "tools[0].function.name"),
    ("tools", [[{"type": "function", "function": {"name": "f" * 65}}]], "string_above_max_length", "tools[0].function.name"),
    (
        "tools",
        [[{"type": "function", "function": {"name": "f", "parameters": 1}}]],
        "invalid_type",
        "tools[0].function.parameters",
    ),
    ("tools", [[{"type": "function", "function": {"name": "f"}}] * 129], "array_above_max_length"),
    ("tool_choice", all_but(str, dict), "invalid_type"),
    ("tool_choice", ["required", {"type": "function", "function": {"name": "f"}}, "any"], "invalid_value"),
    ("tool_choice", [{"type": "function"}], "missing_required_parameter", "tool_choice.function"),
    ("tool_choice", [{"type": "custom", "custom": {"name": "f"}}], "unsupported_parameter"),
    ("functions", all_but(list), "invalid_type"),
    ("functions", [[{}]], "missing_required_parameter", "functions[0].name"),
    ("functions", [[{"name": "a.b"}]], "invalid_value", "functions[0].name"),
    ("function_call", all_but(str, dict), "invalid_type"),
    ("function_call", [{"name": "f"}, "required"], "invalid_value"),
    ("modalities", all_but(list), "invalid_type"),
    ("modalities", [["text", "smell"]], "invalid_value", "modalities[1]"),
    ("modalities", [["text", "audio"]], "unsupported_parameter"),
    ("audio", all_but(dict), "invalid_type"),
    ("audio", [{"voice": "alloy", "format": "wav"}], "unsupported_parameter"),
    ("web_search_options", all_but(dict), "invalid_type"),
    ("web_search_options", [{}], "unsupported_parameter"),
    ("moderation", all_but(dict), "invalid_type"),
    ("moderation", [{}], "unsupported_parameter"),
]

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

# the last of the messages, code, and what is named within it
BAD_MESSAGES = [
    (None, "invalid_type", ""),
    ("Hello", "invalid_type", ""),
    ([user("Hello")], "invalid_type", ""),
    ({}, "missing_required_parameter", ".role"),
    ({"content": "Hello"}, "missing_required_parameter", ".role"),
    ({"role": None, "content": "Hello"}, "missing_required_parameter", ".role"),
    ({"role": 1, "content": "Hello"}, "invalid_type", ".role"),
    ({"role": "", "content": "Hello"}, "invalid_value", ".role"),
    ({"role": "User", "content": "Hello"}, "invalid_value", ".role"),
    ({"role": "function", "content": "1"}, "missing_required_parameter", ".name"),
    ({"role": "<end>", "content": "Hello"}, "invalid_value", ".role"),
    ({"role": "user"}, "missing_required_parameter", ".content"),
    ({"role": "system"}, "missing_required_parameter", ".content"),
    ({"role": "developer"}, "missing_required_parameter", ".content"),
    (user(1), "invalid_type", ".content"),
    (user(True), "invalid_type", ".content"),
    (user({"type": "text", "text": "Hello"}), "invalid_type", ".content"),
    (user(["Hello"]), "invalid_type", ".content[0]"),
    (user([{"text": "Hello"}]), "missing_required_parameter", ".content[0].type"),
    (user([{"type": "text"}]), "missing_required_parameter", ".content[0].text"),
    (user([{"type": "text", "text": 1}]), "invalid_type", ".content[0].text"),
    (user([{"type": ["text"], "text": "Hello"}]), "invalid_type", ".content[0].type"),
    (user([{"type": "text", "text": "Look"}, IMAGE]), "invalid_value", ".content[1].type"),
    (user([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]), "invalid_value", ".content[0].type"),
    (user([{"type": "file", "file": {"file_id": "file-1"}}]), "invalid_value", ".content[0].type"),
    (user([{"type": "refusal", "refusal": "No"}]), "invalid_value", ".content[0].type"),
    (user("Hello") | {"name": 1}, "invalid_type", ".name"),
    ({"role": "assistant", "content": 1}, "invalid_type", ".content"),
    ({"role": "assistant", "content": [IMAGE]}, "invalid_value", ".content[0].type"),
    ({"role": "assistant", "refusal": 1}, "invalid_type", ".refusal"),
    ({"role": "assistant", "audio": {"id": "audio_1"}}, "unsupported_parameter", ".audio"),
    ({"role": "assistant", "function_call": {"name": "f"}}, "missing_required_parameter", ".function_call.arguments"),
    ({"role": "assistant", "tool_calls": {"id": "call_1"}}, "invalid_type", ".tool_calls"),
    ({"role": "assistant", "tool_calls": ["f"]}, "invalid_type", ".tool_calls[0]"),
    (calling(type="custom"), "invalid_value", ".tool_calls[0].type"),
    (calling(id=1), "invalid_type", ".tool_calls[0].id"),
    (calling(function=None), "missing_required_parameter", ".tool_calls[0].function"),
    (calling(function={}), "missing_required_parameter", ".tool_calls[0].function.name"),
    (calling(function={"name": "f", "arguments": {}}), "invalid_type", ".tool_calls[0].function.arguments"),
    ({"role": "tool", "content": "1"}, "missing_required_parameter", ".tool_call_id"),
    ({"role": "tool", "content": "1", "tool_call_id": ""}, "empty_string", ".tool_call_id"),
    ({"role": "tool", "content": "1", "tool_call_id": 1}, "invalid_type", ".tool_call_id"),
    ({"role": "tool", "content": [IMAGE], "tool_call_id": "call_1"}, "invalid_value", ".content[0].type"),
    ({"role": "tool", "tool_call_id": "call_1"}, "missing_required_parameter", ".content"),
]


def malformed_bodies():
    return [(f"body: {name}", Case(400, data=data)) for name, data in BAD_BODIES.items()]


def bad_values():
    for parameter, values, code, *named in BAD_VALUES:
        stream = parameter == "stream_options" and code is not None
        for value in values:
            body = chat_body(stream=True) if stream else chat_body()
            yield f"{parameter}={value!r:.40}", Case(400, code, *(named or [parameter]), data=encode(body | {parameter: value}))


def bad_messages():
    for message, code, named in BAD_MESSAGES:
        data = encode(chat_body(messages=[user("Hello"), message]))
        yield f"message: {message!r:.60}", Case(400, code, f"messages[1]{named}", data=data)


def chats():
    """Whole requests whose parts are right."""
    duplicate = PLAIN[:-1] + b', "temperature": 0, "temperature": "hot"}'
    number = PLAIN[:-1] + b', "temperature": 1e999}'
    return {
        "no model": Case(400, data=encode({"messages": [user("Hello")]})),
        "a null model": Case(400, data=encode(chat_body(model=None))),
        "no messages": Case(400, "missing_required_parameter", "messages", data=encode({"model": MODEL})),
        "null messages": Case(400, "missing_required_parameter", "messages", data=encode(chat_body(messages=None))),
        "an empty object": Case(400, data=b"{}"),
        "a key given twice, wrong the second time": Case(400, "invalid_type", "temperature", data=duplicate),
        "a number beyond floating point": Case(400, "decimal_above_max_value", "temperature", data=number),
        "an unknown model": Case(404, "model_not_found", data=encode(chat_body(model="nobody"))),
        "an empty model": Case(404, "model_not_found", data=encode(chat_body(model=""))),
        "a model in other letters": Case(404, "model_not_found", data=encode(chat_body(model=MODEL.upper()))),
        "a model of a long name": Case(404, "model_not_found", data=encode(chat_body(model="x" * 30_000))),
        "a model that is a path": Case(404, "model_not_found", data=encode(chat_body(model="../../etc/passwd"))),
        "a prompt of the whole context": too_long(chat_body("x" * (CONTEXT_LENGTH - NUM_TEMPLATE_TOKENS))),
        "a prompt longer than the context": too_long(chat_body("x" * 10_000)),
        "many messages": too_long(chat_body(messages=[user("")] * 500)),
        "one token more than fits": too_long(chat_body("", max_tokens=CONTEXT_LENGTH - NUM_TEMPLATE_TOKENS + 1)),
        "the most tokens there can be": too_long(chat_body(max_tokens=2**31 - 1)),
        "the newer name wins": too_long(chat_body(max_tokens=1, max_completion_tokens=1000)),
        "too long, streamed": too_long(chat_body("x" * 300, stream=True)),
        "too long, twice": too_long(chat_body("x" * 300, n=2)),
        "a result without a call": Case(
            400,
            None,
            "messages.[0].role",
            data=encode(chat_body(messages=[{"role": "tool", "content": "1", "tool_call_id": "call_1"}])),
        ),
    }.items()


def too_long(body):
    return Case(400, "context_length_exceeded", "messages", data=encode(body))


def transport():
    """What is wrong with a request before its JSON is looked at."""
    large = b" " * (MAX_BODY_SIZE + 1)
    huge = str(10**15)
    text, gzipped = "text/plain; charset=utf-8", {"Content-Encoding": "gzip"}
    return {
        "plain text": Case(400, "unsupported_content_type", headers={"Content-Type": text}),
        "a form": Case(400, "unsupported_content_type", headers={"Content-Type": "application/x-www-form-urlencoded"}),
        "an upload": Case(400, "unsupported_content_type", headers={"Content-Type": "multipart/form-data; boundary=x"}),
        "a content type that is none": Case(400, "unsupported_content_type", headers={"Content-Type": "json"}),
        "gzip": Case(400, "unsupported_content_type", data=gzip.compress(PLAIN), headers=gzipped),
        "two encodings": Case(400, "unsupported_content_type", headers={"Content-Encoding": "identity, br"}),
        "too large": Case(413, "request_too_large", data=large),
        "said to be too large": Case(413, "request_too_large", environ={"CONTENT_LENGTH": huge}),
        "too large, in chunks": Case(413, "request_too_large", environ=chunked(BytesIO(large))),
        "broken off": Case(400, environ={"wsgi.input": BrokenOff()}),
        "broken off, in chunks": Case(400, environ=chunked(BrokenOff())),
        "malformed, in chunks": Case(400, environ=chunked(BytesIO(PLAIN[:-1]))),
        "shorter than said": Case(400, environ={"CONTENT_LENGTH": str(len(PLAIN) + 1)}),
        "a length that is none": Case(400, environ={"CONTENT_LENGTH": "many"}),
        "a negative length": Case(400, environ={"CONTENT_LENGTH": "-1"}),
        "no length": Case(400, environ={"CONTENT_LENGTH": ""}),
        "another host": Case(403, "forbidden_host", headers={"Host": "evil.example"}),
        "a host like loopback": Case(403, "forbidden_host", headers={"Host": "127.0.0.1.evil.example:8080"}),
        "a host of odd characters": Case(403, "forbidden_host", headers={"Host": "a b\xe9<script>"}),
        "another origin": Case(403, "forbidden_origin", headers={"Origin": "https://evil.example"}),
        "an origin like loopback": Case(403, "forbidden_origin", headers={"Origin": "http://localhost.evil.example"}),
        "an origin that is null": Case(403, "forbidden_origin", headers={"Origin": "null"}),
        "an unload from another origin": Case(
            403, "forbidden_origin", path=f"{MODEL_URL}?action=unload", headers={"Origin": "https://evil.example"}
        ),
        "a wrong key": Case(401, "invalid_api_key", headers={"Authorization": "Bearer sk-wrong"}),
        "a part of the key": Case(401, "invalid_api_key", headers={"Authorization": f"Bearer {KEY[:-1]}"}),
        "no key": Case(401, headers={"Authorization": ""}),
        "an empty key": Case(401, headers={"Authorization": "Bearer "}),
        "a password": Case(401, headers={"Authorization": "Basic c2stcmlnaHQ="}),
        "a key of other letters": Case(401, "invalid_api_key", headers={"Authorization": "Bearer \xe9\xff"}),
        "no key for a list": Case(401, method="GET", path="/v1/models", headers={"Authorization": ""}),
        "no key for nothing": Case(401, method="GET", path="/nothing", headers={"Authorization": ""}),
    }.items()


def urls():
    return {
        "GET of a chat": Case(405, "method_not_allowed", method="GET"),
        "PUT of a chat": Case(405, "method_not_allowed", method="PUT"),
        "a method nobody knows": Case(405, "method_not_allowed", method="BREW"),
        "POST of health": Case(405, "method_not_allowed", path="/health"),
        "POST of the list": Case(405, "method_not_allowed", path="/v1/models"),
        "DELETE of a long URL": Case(405, "method_not_allowed", method="DELETE", path="/v1/models/" + "x" * 20_000),
        "DELETE of a model": Case(405, "method_not_allowed", method="DELETE", path=MODEL_URL),
        "no such URL": Case(404, "unknown_url", path="/v1/chat/complete"),
        "no such URL, nor method": Case(404, "unknown_url", method="BREW", path="/brew"),
        "an older API": Case(404, "unknown_url", path="/v1/engines/davinci/completions"),
        "a stored completion": Case(404, "unknown_url", method="GET", path=f"{CHAT}/chatcmpl-1"),
        "a file": Case(404, "unknown_url", method="GET", path="/../../etc/passwd"),
        "a long URL": Case(404, "unknown_url", method="GET", path="/" + "x" * 20_000),
        "a URL that is no UTF-8": Case(404, "unknown_url", method="GET", path="/%ff%00%0a"),
        "slashes": Case(404, "unknown_url", method="GET", path="/v1//models"),
        "an unknown model": Case(404, "model_not_found", method="GET", path="/v1/models/nobody"),
        "a model of odd characters": Case(404, "model_not_found", method="GET", path="/v1/models/%ff%00%e2%80%a8"),
        "a part of a model": Case(404, "model_not_found", method="GET", path="/v1/models/org"),
        "load of an unknown model": Case(404, "model_not_found", path="/v1/models/nobody?action=load"),
        "no action": Case(400, "missing_required_parameter", "action", path=MODEL_URL),
        "an empty action": Case(400, "invalid_value", "action", path=f"{MODEL_URL}?action="),
        "an unknown action": Case(400, "invalid_value", "action", path=f"{MODEL_URL}?action=explode"),
        "an action in other letters": Case(400, "invalid_value", "action", path=f"{MODEL_URL}?action=LOAD"),
        "an action that is no UTF-8": Case(400, "invalid_value", "action", path=f"{MODEL_URL}?action=%ff"),
        "an action in the body": Case(400, "missing_required_parameter", "action", path=MODEL_URL, data=b'{"action": "load"}'),
    }.items()


CASES = [*malformed_bodies(), *bad_values(), *bad_messages(), *chats(), *transport(), *urls()]


@pytest.fixture(scope="module")
def served():
    """With room for one chat at a time, so that whatever a request does not give back is missed by the next."""
    with serving(say(FINE), threads=RESERVED_THREADS + 1, max_body_size=MAX_BODY_SIZE, api_keys=(KEY,)) as served:
        yield served


def ask(served, content="Hello", **parameters):
    """A good request, which the model answers anew."""
    return served.chat(content, headers={"Authorization": f"Bearer {KEY}", "Cache-Control": "no-cache"}, **parameters)


def check_envelope(response):
    assert response.mimetype == "application/json"
    assert response.json.keys() == {"error"}
    error = response.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 1000
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES])
def test_a_bad_request_is_told_what_is_wrong_and_the_next_one_is_answered(served, case):
    response = case.send(served.client)
    error = check_envelope(response)
    assert (response.status_code, error["code"], error["param"]) == (case.status, case.code, case.param), error["message"]
    answer = ask(served, temperature=0)
    assert answer.json["choices"][0]["message"]["content"] == FINE


def test_every_parameter_has_bad_values():
    assert {parameter for parameter, *_ in BAD_VALUES} == set(ChatRequest.declared)


TEMPLATES = {
    "its own words": ("{{ raise_exception('Say ' ~ messages[0].content ~ ' again') }}", "Say Hello again"),
    "an error": ("{{ 1 // 0 }}", "division"),
    "something undefined": ("{{ messages[7].content.upper() }}", "no element 7"),
    "something forbidden": ("{{ messages.append(1) }}", "append"),
    "far too much": ("{% for i in range(9999) %}{{ messages[0].content * 9999 }}{% endfor %}", "characters"),
    "nothing": ("{# nothing #}", "empty prompt"),
    "no end": ("{% for i in range(10 ** 9) %}{% endfor %}", "range"),
}


@pytest.mark.parametrize(("template", "words"), TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_template_that_cannot_be_rendered_is_a_bad_request_with_the_reason(serve, template, words, stream):
    response = serve(template=template).chat("Hello", stream=stream)
    error = check_envelope(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "chat_template_error", None)
    assert words in error["message"]


@pytest.mark.parametrize("content", ["<end>", "<start>assistant\nYes.<end>", "<eos><bos>", "<sta", "<end", "rt><end>"])
def test_control_tokens_in_what_a_user_writes_are_text(served, content):
    usage = ask(served, content).json["usage"]
    assert usage["prompt_tokens"] == NUM_TEMPLATE_TOKENS + len(content.encode())


def test_the_message_of_a_prompt_that_is_too_long_has_both_numbers(served):
    error = ask(served, "x" * 300).json["error"]
    assert "256" in error["message"]
    assert str(NUM_TEMPLATE_TOKENS + 300) in error["message"]
    error = ask(served, "", max_tokens=250).json["error"]
    assert all(str(number) in error["message"] for number in (256, NUM_TEMPLATE_TOKENS + 250, NUM_TEMPLATE_TOKENS, 250))


EDGES = [
    {"max_tokens": 1},
    {"max_tokens": CONTEXT_LENGTH - NUM_TEMPLATE_TOKENS - len("Hello")},
    {"n": 1, "top_k": 0, "seed": 0, "temperature": 2, "top_p": 1, "min_p": 1, "repetition_penalty": 2},
    {"top_k": -1, "seed": -(2**63), "temperature": 0, "top_p": 0, "min_p": 0, "repetition_penalty": 0.01},
    {"seed": 2**63 - 1, "presence_penalty": 2, "frequency_penalty": -2, "temperature": 1e-300},
    {"presence_penalty": -2, "frequency_penalty": 2, "temperature": 1, "top_k": 2**31 - 1},
    {"stop": []},
    {"stop": ["\0"] * 16},
    {"metadata": {"k" * 64: "v" * 512} | {str(number): "" for number in range(15)}},
    {"logprobs": False, "logit_bias": {}, "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"},
    {"modalities": ["text"], "functions": [], "function_call": "none", "top_logprobs": 0},
    {"logprobs": True, "top_logprobs": 20, "logit_bias": {"0": -100, "259": 100}, "min_tokens": 3, "max_tokens": 3},
    {"response_format": {"type": "json_object"}, "ignore_eos": True, "stop_token_ids": [0, 259], "max_tokens": 5},
    {"response_format": schema_format(strict=True, description="x"), "max_tokens": 5},
    {"choice": ["\n", "\u2028", '"', "a\\"], "max_tokens": 5},
    {"messages": [user(None), user(""), user([]), user([{"type": "text", "text": "Hello"}]), {"role": "assistant"}]},
    dict.fromkeys(name for name in ChatRequest.declared if name not in ("model", "messages")),
]


@pytest.mark.parametrize("parameters", EDGES, ids=[f"{edge!r:.60}" for edge in EDGES])
def test_what_is_just_within_bounds_is_answered(served, parameters):
    answer = ask(served, **parameters)
    assert answer.status_code == 200, answer.text
    assert "X-LLMServe-Ignored" not in answer.headers


def test_a_body_of_the_largest_size_is_read_whole(served):
    padded = PLAIN.ljust(MAX_BODY_SIZE)
    assert Case(200, data=padded).send(served.client).status_code == 200
    assert Case(200, environ=chunked(BytesIO(padded))).send(served.client).status_code == 200


def test_fields_that_nothing_knows_are_named_and_cannot_make_headers(served):
    answer = ask(served, **{"thinking": {}, "Set-Cookie: a\r\nb": 1}, messages=[user("Hello") | {"mood": "fine"}])
    assert answer.status_code == 200
    assert answer.headers["X-LLMServe-Ignored"] == "messages[0].mood, thinking, Set-Cookie??a??b"


WORDS = {
    "The model `nobody` does not exist or you do not have access to it.": {"model": "nobody"},
    "you must provide a model parameter": {"model": None},
    "Missing required parameter: 'messages'.": {"messages": None},
    "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.": {
        "messages": []
    },
    "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got -1 instead.": {"max_tokens": -1},
    "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 2.5 instead.": {"temperature": 2.5},
    "Invalid 'top_p': decimal below minimum value. Expected a value >= 0, but got -1 instead.": {"top_p": -1},
    "Invalid 'n': integer above maximum value. Expected a value <= 128, but got 129 instead.": {"n": 129},
    "Invalid type for 'n': expected an integer, but got a string instead.": {"n": "1"},
    "Invalid type for 'messages[0].content': expected one of a string or array of objects, but got an object instead.": {
        "messages": [{"role": "user", "content": {}}]
    },
    "Invalid value: 'xml'. Supported values are: 'text', 'json_object', and 'json_schema'.": {
        "response_format": {"type": "xml"}
    },
    "The 'stream_options' parameter is only allowed when 'stream' is enabled.": {"stream_options": {"include_usage": True}},
    "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with 'tool_calls'.": {
        "messages": [{"role": "tool", "tool_call_id": "a", "content": "b"}]
    },
    "This model's maximum context length is 256 tokens. However, you requested 1023 tokens (23 in the messages, 1000 in the "
    "completion). Please reduce the length of the messages or completion.": {"max_tokens": 1000},
    "This model's maximum context length is 256 tokens. However, your messages resulted in 318 tokens. Please reduce the length "
    "of the messages.": {"messages": [{"role": "user", "content": "x" * 300}]},
}


@pytest.mark.parametrize("words", WORDS)
def test_errors_are_told_in_openais_words(words):
    with serving() as served:
        response = served.chat(**WORDS[words])
        assert check_envelope(response)["message"] == words


def test_a_strict_server_refuses_what_it_does_not_know_in_openais_words():
    with serving(strict=True) as served:
        error = check_envelope(served.chat(top_q=1))
    assert error == {
        "message": "Unknown parameter: 'top_q'.",
        "type": "invalid_request_error",
        "param": "top_q",
        "code": "unknown_parameter",
    }
