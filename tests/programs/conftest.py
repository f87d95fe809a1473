"""Programs that were written for OpenAI's API, in an environment of their own: they know the server by its URL only.

SERVER_PYTHON is the interpreter of the server's environment. `make programs` makes both and sets it.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import harness

MODEL = harness.MODEL
TINY = "org/tiny"
EMBEDDER = "tiny-vectors"
QUESTION = "What is the weather in Paris?"
README = Path(__file__).parents[2] / "README.md"
README_URL = "http://localhost:8080"


@pytest.fixture(scope="session", autouse=True)
def environment():
    if "SERVER_PYTHON" not in os.environ:
        pytest.skip("`make programs` runs these, in an environment that has the programs")


@pytest.fixture(scope="session")
def beside(environment):
    """Run `tests.programs.beside` with the server's interpreter: (arguments, text) in, text out."""

    def beside(*arguments, text=""):
        command = [harness.PYTHON, "-m", "tests.programs.beside", *map(str, arguments)]
        return subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True, timeout=300).stdout

    return beside


@pytest.fixture(scope="session", params=["ctransformers", "llamacpp"])
def engine(request, beside):
    """Each engine that the server's environment has."""
    if request.param not in beside("engines").split():
        pytest.skip("the extra `llamacpp` is not installed")
    return request.param


@pytest.fixture(scope="session")
def server(engine, beside, tmp_path_factory):
    """The default model, and a tiny one that makes vectors."""
    folder = tmp_path_factory.mktemp("server")
    beside("tiny", folder / "tiny.gguf")
    config = harness.model_table(engine=engine)
    config += harness.table(
        id=EMBEDDER, source=str(folder / "tiny.gguf"), load="on_demand", engine="ctransformers", task="embed"
    )
    with harness.llmserve(config, log=folder / "log") as running:
        yield running


@pytest.fixture(scope="session")
def url(server):
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="session")
def documented(url):
    """What the README's table of programs says of one, with this server's URL."""

    def documented(program):
        (row,) = re.findall(rf"^\| {re.escape(program)} \| .*`(.+)` \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
        assert README_URL in row and MODEL in row
        return row.replace(README_URL, url)

    return documented
