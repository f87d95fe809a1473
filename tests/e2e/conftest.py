"""A real server for the end-to-end tests: gunicorn in a subprocess, the real model, and a tiny one beside it."""

from __future__ import annotations

import pytest

from benchmarks import harness
from llmserve.models.loading import has_llamacpp
from tests.tiny_models import write_infill, write_llama_spm

MODEL = harness.MODEL
EMBEDDER = "tiny-vectors"
INFILL = "tiny-infill"
ENGINES = [
    "ctransformers",
    pytest.param("llamacpp", marks=pytest.mark.skipif(not has_llamacpp(), reason="the extra `llamacpp` is not installed")),
]


@pytest.fixture(scope="session", params=ENGINES)
def server(request, tmp_path_factory):
    """On each engine that is installed."""
    folder = tmp_path_factory.mktemp("server")
    tiny = write_llama_spm(folder / "tiny.gguf")
    config = harness.model_table(aliases=["gpt-3.5-turbo", "gpt-4"], engine=request.param) + harness.table(
        id="org/tiny", source=str(tiny), load="on_demand", engine=request.param
    )
    config += harness.table(id=EMBEDDER, source=str(tiny), load="on_demand", engine=request.param, task="embed")
    infill = write_infill(folder / "infill.gguf")
    config += harness.table(id=INFILL, source=str(infill), load="on_demand", engine=request.param)
    with harness.llmserve(config, log=folder / "log") as running:
        yield running


@pytest.fixture
def base_url(server):
    return f"http://127.0.0.1:{server.port}/v1"


@pytest.fixture
def client(base_url):
    import openai

    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """After every test that used the server, each slot of each model is free within a second."""
    yield
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        for model in (MODEL, "org/tiny", INFILL):
            running.wait_until_idle(model, timeout=1.5)
