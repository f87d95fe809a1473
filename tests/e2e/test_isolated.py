"""Engines in processes of their own, and among the server's threads, under other servers than ours."""

from __future__ import annotations

import http.client
import time
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks import harness
from llmserve import create_app
from llmserve.config import Config, ModelSpec, ServerConfig
from tests.test_mounting import in_waitress, in_werkzeug
from tests.tiny_models import write_llama_spm

ISOLATIONS = ["process", "thread"]
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("run", [in_waitress, in_werkzeug])
def test_under_another_server(tmp_path, run, isolation):
    path = write_llama_spm(tmp_path / "tiny.gguf")
    spec = ModelSpec(id="tiny", source=str(path), engine="ctransformers", isolation=isolation)
    with closing(create_app(Config(ServerConfig(cache_dir=str(tmp_path / "cache")), models=(spec,)))) as app, run(app) as port:
        for _ in range(2):
            status, answer = harness.post(port, "/v1/chat/completions", BODY)
            assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
        assert harness.post(port, "/v1/models/tiny?action=reload")[0] == 200
        assert harness.post(port, "/v1/chat/completions", BODY)[0] == 200


def test_vectors_from_a_process_are_those_of_a_thread(tmp_path):
    path = write_llama_spm(tmp_path / "tiny.gguf")
    specs = [ModelSpec(each, str(path), engine="ctransformers", task="embed", isolation=each) for each in ISOLATIONS]
    texts = ["hello", "the river runs to sea", [5, 6, 7]]
    config = Config(ServerConfig(cache_dir=str(tmp_path / "cache")), models=tuple(specs))
    with closing(create_app(config)) as app, in_waitress(app) as port:
        answers = [harness.post(port, "/v1/embeddings", {"model": each, "input": texts[:2]}) for each in ISOLATIONS]
        answers += [harness.post(port, "/v1/embeddings", {"model": each, "input": texts[2]}) for each in ISOLATIONS]
        status, again = harness.post(port, "/v1/models/process?action=reload")
        assert (status, again["state"]) == (200, "ready")
        status, body = harness.post(port, "/v1/chat/completions", BODY | {"model": "process"})
        assert (status, body["error"]["param"]) == (400, "model")
    assert [status for status, _ in answers] == [200] * 4
    from_process, from_thread = [[answer["data"] for _, answer in answers[index::2]] for index in (0, 1)]
    assert from_process == from_thread
    assert list(map(len, from_process)) == [2, 1]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_mounted_where_each_of_several_workers_has_its_own(tmp_path, isolation):
    """As mod_wsgi does: the application is imported after the fork, in each of them."""
    path = write_llama_spm(tmp_path / "tiny.gguf")
    config = tmp_path / "llmserve.toml"
    config.write_text(harness.table(id="tiny", source=str(path), engine="ctransformers", isolation=isolation))
    environ = {"LLMSERVE_CONFIG": str(config), "LLMSERVE_CACHE_DIR": str(tmp_path / "cache")}
    arguments = ["-w", "2", "-k", "gthread", "--threads", "8", "tests.e2e.mounted:app"]
    with harness.gunicorn(*arguments, environ=environ) as server:
        deadline = time.monotonic() + 60
        workers = set()
        while len(workers) < 2 and time.monotonic() < deadline:
            try:
                workers.add(ask_who(server.port))
                status, _ = harness.post(server.port, "/llm/v1/chat/completions", BODY)
                assert status == 200
            except OSError:
                time.sleep(0.1)
        assert len(workers) == 2
        while len(engines := [pid for worker in workers for pid in children(worker)]) != (2 if isolation == "process" else 0):
            assert time.monotonic() < deadline  # one that had not answered yet may still be loading, or trying the file
            time.sleep(0.05)
    deadline = time.monotonic() + 10
    while any(map(alive, engines)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    """Whether the process runs; one that has ended and that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ask_who(port):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", "/")
        return int(connection.getresponse().read())


def children(pid):
    return [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
