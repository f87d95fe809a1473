"""Start, stop, load, unload and broken files, on real gunicorn processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from benchmarks import harness
from tests.e2e.conftest import MODEL
from tests.tiny_models import broken_files, write_llama_bpe, write_llama_spm


def ask(port, model, content="hi", **options):
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **options}
    return harness.post(port, "/v1/chat/completions", body)


class Follower(threading.Thread):
    """A client of one long stream that does not end by itself, who notes when each piece arrives."""

    def __init__(self, port, max_tokens=400):
        super().__init__()
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Write a very long story."}], "stream": True}
        self.payload = json.dumps(body | {"max_tokens": max_tokens, "seed": 1, "ignore_eos": True}).encode()
        self.port, self.times, self.raw = port, [], b""
        self.flowing = threading.Event()
        self.cpu_times = harness.cpu_times()

    def run(self):
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nCache-Control: no-store\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(f"{head}Content-Length: {len(self.payload)}\r\n\r\n".encode() + self.payload)
            while piece := connection.recv(65536):
                self.times.append(time.monotonic())
                self.raw += piece
                if len(self.times) > 5:
                    self.flowing.set()

    def patience(self):
        """A second; more on a machine whose host has taken its cores away meanwhile."""
        return 1.0 if harness.steal(self.cpu_times, harness.cpu_times()) < 0.05 else 5.0

    def longest_gap(self):
        return max(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))


def test_broken_model_files_are_refused_with_the_reason_while_another_stream_runs_on(tmp_path):
    good = write_llama_bpe(tmp_path / "good.gguf")
    files = broken_files(tmp_path, good)
    options = {"load": "on_demand", "engine": "ctransformers"}
    tables = "".join(harness.table(id=f"broken/{name}", source=str(path), **options) for name, path in files.items())
    with harness.llmserve(harness.model_table() + tables) as server:
        follower = Follower(server.port, max_tokens=900)
        follower.start()
        assert follower.flowing.wait(30)
        reasons = {}
        for name in files:
            status, body = harness.post(server.port, f"/v1/models/broken/{name}?action=load")
            assert (status, body["error"]["code"]) == (503, "model_load_failed"), (name, body)
            reasons[name] = body["error"]["message"]
            assert ask(server.port, f"broken/{name}")[0] == 503
        status, health = server.get("/health")
        assert (status, health["status"]) == (200, "degraded")
        status, listed = server.get(f"/v1/models/broken/{name}")
        assert (listed["state"], listed["reason"]) == ("failed", reasons[name])
        follower.join(120)
        assert b"data: [DONE]" in follower.raw
        assert follower.longest_gap() < follower.patience()
        for name, reason in reasons.items():
            print(f"{name}: {reason}")
        assert len(set(reasons.values())) >= len(files) - 6  # the damaged headers may die alike


def test_unload_and_load_by_request(server):
    assert ask(server.port, MODEL)[0] == 200
    status, body = harness.post(server.port, f"/v1/models/{MODEL}?action=unload")
    assert (status, body["state"]) == (200, "unloaded")
    status, body = harness.post(server.port, f"/v1/models/{MODEL}?action=load")
    assert (status, body["state"]) == (200, "ready")
    assert ask(server.port, MODEL)[0] == 200


def test_an_unloaded_model_is_loaded_by_the_next_request(server):
    assert harness.post(server.port, "/v1/models/org/tiny?action=unload")[0] == 200
    assert ask(server.port, "org/tiny")[0] == 200
    assert server.get("/v1/models/org/tiny")[1]["state"] == "ready"


def test_a_swap_drops_nothing_that_is_in_flight(server):
    followers = [Follower(server.port, max_tokens=120) for _ in range(3)]
    for follower in followers:
        follower.start()
    assert all(follower.flowing.wait(60) for follower in followers)
    status, body = harness.post(server.port, f"/v1/models/{MODEL}?action=reload")
    assert (status, body["state"]) == (200, "ready")
    for follower in followers:
        follower.join(60)
        assert b"data: [DONE]" in follower.raw
        assert b'"error"' not in follower.raw


def test_sigterm_lets_answers_finish_and_refuses_new_ones():
    with harness.llmserve("[server]\ngrace_period = 20\n" + harness.model_table()) as server:
        follower = Follower(server.port, max_tokens=150)
        follower.start()
        assert follower.flowing.wait(30)
        server.process.send_signal(signal.SIGTERM)
        follower.join(30)
        assert b"data: [DONE]" in follower.raw
        assert server.process.wait(15) == 0


def test_after_the_grace_period_a_stream_ends_with_an_error_event():
    with harness.llmserve("[server]\ngrace_period = 0.5\n" + harness.model_table()) as server:
        follower = Follower(server.port, max_tokens=1900)
        follower.start()
        assert follower.flowing.wait(30)
        server.process.send_signal(signal.SIGTERM)
        follower.join(30)
        event = json.loads(follower.raw.split(b"data: ")[-1].split(b"\n")[0])
        assert event["error"]["code"] == "shutting_down"
        assert server.process.wait(15) == 0


def test_health_answers_while_a_model_loads():
    with harness.llmserve(wait=None) as server:
        server.wait("/livez")
        status, health = server.get("/health")
        assert status == 200
        assert health["status"] in ("starting", "healthy")
        assert health["service"] == "LLM Inference Server"
        server.wait("/readyz")
        assert server.get("/health")[1]["status"] == "healthy"


def test_more_workers_than_one_are_refused_in_one_sentence():
    command = [sys.executable, "-m", "gunicorn", "-c", "python:llmserve.gunicorn_conf", "-w", "2", "llmserve.wsgi:app"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "one gthread worker" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("how", ["serve", "gunicorn"])
def test_a_bad_configuration_stops_the_start_with_one_sentence(tmp_path, how):
    path = tmp_path / "llmserve.toml"
    path.write_text("[server]\nport = 1\n")
    commands = {
        "serve": [sys.executable, "-m", "llmserve", "serve", "--config", str(path)],
        "gunicorn": [sys.executable, "-m", "gunicorn", "-c", "python:llmserve.gunicorn_conf", "llmserve.wsgi:app"],
    }
    environ = {**os.environ, "LLMSERVE_CONFIG": str(path)}
    result = subprocess.run(commands[how], capture_output=True, text=True, timeout=60, env=environ)
    assert result.returncode == 1
    assert result.stderr.strip() == "llmserve: server.port is not a configuration key."


def test_a_public_address_without_keys_is_refused():
    result = subprocess.run(
        [sys.executable, "-m", "llmserve", "serve", "--bind", "0.0.0.0:0"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert "api_keys" in result.stderr
    assert "Traceback" not in result.stderr


def test_pull_prints_where_the_model_is(tmp_path):
    tiny = write_llama_spm(tmp_path / "tiny.gguf")
    path = tmp_path / "llmserve.toml"
    path.write_text(harness.table(id="tiny", source=str(tiny), aliases=["t"]))
    command = [sys.executable, "-m", "llmserve", "pull", "--config", str(path)]
    assert subprocess.run([*command, "t"], capture_output=True, text=True, timeout=60).stdout == f"tiny: {tiny}\n"
    result = subprocess.run([*command, "other"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "other is no configured model" in result.stderr
