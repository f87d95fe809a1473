"""Embeddings over WSGI: what is asked for is checked before a vector is made, and a model that makes vectors writes no text."""

import base64

import numpy as np
import pytest
from werkzeug.test import Client

from llmserve import create_app
from llmserve.config import Config, ModelSpec
from llmserve.registry import ModelRegistry
from tests.fake_process import FakeProcessLoader
from tests.fakes import FakeEmbedder, make_engine

MODEL = "vectors"


@pytest.fixture
def embedder():
    return FakeEmbedder()


class Loader(FakeProcessLoader):
    """The same without processes."""

    def open(self, statistics):
        return make_engine(self._make_backends(), statistics=statistics)


@pytest.fixture(params=[Loader, FakeProcessLoader], ids=["thread", "process"])
def post(request, embedder):
    config = Config(models=(ModelSpec(MODEL, "none", load="on_demand"),))
    app = create_app(config, registry=ModelRegistry(config.models, lambda: request.param(lambda: embedder)))
    client = Client(app)
    yield lambda path, **fields: client.post(path, json={"model": MODEL} | fields, buffered=True)
    app.close()


def embed(post, texts, **fields):
    return post("/v1/embeddings", input=texts, **fields)


def test_other_programs_are_made_room_for_so_what_one_thread_takes_is_learnt_first(post, embedder):
    embed(post, ["a", "b", "c"])
    assert embedder.threads == [1, 1, 1]


def test_vectors_have_length_one_and_come_in_order(post):
    answer = embed(post, ["abc", "d"]).json
    lengths = [(3, 97), (1, 100)]
    expected = [[x / np.hypot(x, y), y / np.hypot(x, y), 0] for x, y in lengths]
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    np.testing.assert_allclose([entry["embedding"] for entry in answer["data"]], expected, rtol=1e-6)
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


def test_base64_is_of_the_same_floats(post):
    floats, encoded = (embed(post, "abc", encoding_format=kind).json["data"][0]["embedding"] for kind in ("float", "base64"))
    assert np.frombuffer(base64.b64decode(encoded), "<f4").tolist() == floats


def test_fewer_dimensions_are_the_first_ones_at_length_one(post):
    assert embed(post, "abc", dimensions=1).json["data"][0]["embedding"] == [1]
    assert len(embed(post, "abc", dimensions=3).json["data"][0]["embedding"]) == 3


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"dimensions": 4}, "dimensions", "integer_above_max_value"),
        ({"dimensions": 0}, "dimensions", "integer_below_min_value"),
        ({"input": ["abc", "x" * 17]}, "input[1]", "context_length_exceeded"),
        ({"input": ["abc", [999]]}, "input[1]", "invalid_value"),
        ({"input": ["abc", ""]}, "input[1]", "empty_string"),
        ({"input": [[97], []]}, "input[1]", "empty_array"),
    ],
)
def test_a_mistake_is_found_before_the_work(post, embedder, fields, param, code):
    response = post("/v1/embeddings", **{"input": "abc"} | fields)
    assert response.status_code == 400
    assert (response.json["error"]["param"], response.json["error"]["code"]) == (param, code)
    assert embedder.texts == []


@pytest.mark.parametrize("prompt", ["abc", [97, 98], [[97], [98]], ["abc", "d"]], ids=str)
@pytest.mark.parametrize(
    "fields", [{}, {"stream": True}, {"suffix": "x"}, {"echo": True, "logprobs": 1, "max_tokens": 0}], ids=str
)
def test_a_model_that_makes_vectors_completes_nothing(post, prompt, fields):
    response = post("/v1/completions", prompt=prompt, **fields)
    assert response.status_code == 400
    assert (response.json["error"]["param"], response.json["error"]["code"]) == ("model", "unsupported_value")


def test_nor_does_it_chat(post):
    response = post("/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}])
    assert (response.status_code, response.json["error"]["param"]) == (400, "model")


def test_its_tokens_can_be_counted(post):
    assert post("/tokenize", prompt="abc").json["tokens"] == [97, 98, 99]
