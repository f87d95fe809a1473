"""schemathesis against /openapi.json: no request is answered with a server error, or with what the document does not describe.

All models are tiny, so that thousands of requests take seconds.
"""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from benchmarks import harness
from tests.programs.conftest import EMBEDDER, TINY

KEY = "secret"
CASES = 5000
ROOT = Path(__file__).parents[2]
SETTINGS = Path(__file__).with_name("schemathesis.toml")


@pytest.fixture(scope="session")
def model_file(beside, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "tiny.gguf"
    beside("tiny", path)
    return path


@contextmanager
def serving(engine, model_file, *, keys=()):
    config = f"[server]\napi_keys = {json.dumps(keys)}\n"
    shared = {"source": str(model_file), "context_length": 64}
    config += harness.table(id=TINY, aliases=["gpt-4"], engine=engine, **shared)
    config += harness.table(id=EMBEDDER, engine="ctransformers", task="embed", **shared)
    with harness.llmserve(config) as server:
        yield server


@pytest.fixture
def schemathesis(tmp_path):
    """(document, options) in, (exit status, output) out."""
    return partial(_schemathesis, tmp_path)


def _schemathesis(folder, document, *options):
    command = [Path(sys.executable).with_name("schemathesis"), "--config-file", SETTINGS, "--no-color", "run", document]
    environ = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.programs.fuzz_hooks", "PYTHONPATH": str(ROOT)}
    shared = ["--checks", "all", "--continue-on-failure", "--suppress-health-check", "all", "--no-shrink"]
    result = subprocess.run(
        [*command, *shared, *options], cwd=folder, env=environ, capture_output=True, text=True, timeout=400, check=False
    )
    return result.returncode, result.stdout + result.stderr


def test_thousands_of_requests_are_answered_as_described(engine, model_file, schemathesis):
    with serving(engine, model_file) as server:
        outcome = schemathesis(*everything(server))
    check(*outcome)


def test_so_they_are_with_keys(model_file, schemathesis):
    with serving("ctransformers", model_file, keys=(KEY,)) as server:
        outcome = schemathesis(*everything(server), "--header", f"Authorization:Bearer {KEY}")
    check(*outcome)


def everything(server):
    return f"http://127.0.0.1:{server.port}/openapi.json", "--max-examples", "160", "--seed", "1", "--workers", "1"


def check(status, output):
    assert status == 0, output
    number = int(re.search(r"(\d+) generated", output)[1])
    print(f"{number} requests")
    assert number >= CASES


@pytest.fixture(scope="module")
def described(model_file):
    """A server's URL and its document, to be made false."""
    with serving("ctransformers", model_file) as server:
        yield f"http://127.0.0.1:{server.port}", server.get("/openapi.json")[1]


def _tokens_are_texts(document):
    document["paths"]["/tokenize"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]["properties"][
        "count"
    ] = {"type": "string"}


def _chunks_have_colours(document):
    document["components"]["schemas"]["CompletionRequest"]["properties"]["stream"] = {"const": True}
    document["components"]["schemas"]["CompletionRequest"]["required"].append("stream")
    media = document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    media["itemSchema"]["properties"]["data"]["anyOf"][1]["contentSchema"]["anyOf"][0]["required"].append("colour")


def _heat_has_no_bounds(document):
    temperature = document["components"]["schemas"]["CompletionRequest"]["properties"]["temperature"]
    temperature.update(minimum=1000, maximum=2000)


def _one_token_will_do(document):
    document["components"]["schemas"]["DetokenizeRequest"]["properties"]["tokens"]["items"]["maximum"] = 0


def _errors_have_no_status(document):
    del document["paths"]["/detokenize"]["post"]["responses"]["400"]


FALSE = {
    "an answer outside the schema": ("/tokenize", _tokens_are_texts, "Response violates schema"),
    "an event outside the schema": ("/v1/completions", _chunks_have_colours, "SSE event violates schema"),
    "a refusal without a reason": ("/v1/completions", _heat_has_no_bounds, "refused without a reason"),
    "an acceptance without a reason": ("/detokenize", _one_token_will_do, "Invalid data should have been rejected"),
    "an undescribed status": ("/detokenize", _errors_have_no_status, "Undocumented status code"),
}


@pytest.mark.parametrize("what", FALSE)
def test_what_is_false_is_found(described, schemathesis, tmp_path, what):
    url, document = described
    path, falsify, finding = FALSE[what]
    false = json.loads(json.dumps(document))
    falsify(false)
    (tmp_path / "openapi.json").write_text(json.dumps(false))
    options = ["--url", url, "--include-path", path, "--max-examples", "50", "--seed", "1", "--phases", "coverage,fuzzing"]
    status, output = schemathesis(tmp_path / "openapi.json", *options)
    assert status == 1 and finding in output, output


def test_a_server_error_is_found(environment, schemathesis, tmp_path):
    (tmp_path / "broken.gguf").write_text("This is no model.")
    broken = harness.table(id="broken", source=str(tmp_path / "broken.gguf"), engine="ctransformers", load="on_demand")
    with harness.llmserve(broken) as server:
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        status, output = schemathesis(url, "--include-path", "/tokenize", "--max-examples", "20", "--seed", "1")
    assert status == 1 and "Server error" in output, output
