"""The description of the API is of what is served, and by what checks it."""

import json
from html.parser import HTMLParser

import jsonschema
import pytest

from llmserve.api import openapi, urls
from llmserve.api.fields import Struct, optional
from tests.api.conftest import ALIAS, MODEL, chat_body


def validate(body):
    document = openapi.document((MODEL,))
    schema = {"$ref": "#/components/schemas/ChatRequest", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)


def test_every_url_and_method_is_described(served):
    document = served.client.get("/openapi.json").json
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    rules = {
        (rule.rule.replace("<path:name>", "{name}"), method)
        for rule in urls.URLS.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert described == rules
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["summary"].endswith(".")


def test_every_post_with_a_body_says_which():
    for path, methods in openapi.document((MODEL,))["paths"].items():
        if "post" in methods and path != "/v1/models/{name}":
            assert "$ref" in methods["post"]["requestBody"]["content"]["application/json"]["schema"], path


def test_references_lead_somewhere():
    document = openapi.document((MODEL,))
    text = json.dumps(document)
    for name in {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": None, "stop": ["a"], "logit_bias": {"5": 1}, "stream": True, "stream_options": {"include_usage": True}},
        {
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}},
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]},
                {"role": "user", "content": "x"},
            ]
        },
        {"audio": None, "modalities": ["text"], "unknown": 1},
    ],
)
def test_what_is_taken_is_described(serve, parameters):
    served = serve(context_length=2048)
    body = chat_body(max_tokens=1) | parameters
    validate(body)
    assert served.client.post("/v1/chat/completions", json=body, buffered=True).status_code == 200


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 3},
        {"n": 0},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "clown", "content": "x"}]},
        {"stop": [""]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tool_choice": "any"},
        {"audio": {}},
        {"model": None},
    ],
)
def test_what_is_refused_is_not(served, parameters):
    body = chat_body() | parameters
    with pytest.raises(jsonschema.ValidationError):
        validate(body)
    assert served.client.post("/v1/chat/completions", json=body).status_code == 400


def test_a_server_names_its_models(served):
    document = served.client.get("/openapi.json").json
    for name in ("ChatRequest", "CompletionRequest", "EmbeddingsRequest", "TokenizeRequest", "DetokenizeRequest"):
        assert document["components"]["schemas"][name]["properties"]["model"]["enum"] == [MODEL, ALIAS]
    assert document["components"]["parameters"]["name"]["schema"]["enum"] == [MODEL, ALIAS]


def test_a_server_says_whether_it_asks_for_keys(serve, served):
    assert served.client.get("/openapi.json").json["security"] == []
    document = serve(api_keys=("secret",)).client.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json
    assert document["security"] == [{"key": []}]
    open_to_all = {path for path, methods in document["paths"].items() if methods.get("get", {}).get("security") == []}
    assert open_to_all == {"/health", "/livez", "/readyz"}


def test_every_answer_is_described():
    for path, methods in openapi.document((MODEL,))["paths"].items():
        for operation in methods.values():
            for media in operation["responses"]["200"]["content"].values():
                assert media.get("schema") or media.get("itemSchema"), path


def test_a_parser_without_a_schema_is_found_out():
    class Odd(Struct):
        field: object = optional(object())

    with pytest.raises(KeyError):
        openapi.schema_of(Odd, {})


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "img", "iframe", "object")
        self.found += [value for name, value in attributes if name in ("href", "src")]

    def handle_data(self, data):
        self.text += data


def test_the_page_describes_the_same_and_needs_nothing_from_elsewhere(served):
    response = served.client.get("/docs")
    assert response.mimetype == "text/html"
    page = Links()
    page.feed(response.text)
    assert page.found == ["openapi.json"]
    assert "url(" not in response.text and "@import" not in response.text
    for path, methods in openapi.document((MODEL,))["paths"].items():
        assert path in page.text
        for operation in methods.values():
            assert operation["summary"] in page.text
    assert "parallel_tool_calls" in page.text
