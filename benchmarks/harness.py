"""Start and stop what is measured, and speak HTTP to it with as little work as possible: the client shares the cores."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmserve.models.batch_model import BatchModel

PYTHON = os.environ.get("SERVER_PYTHON", sys.executable)
"""Whose environment the servers are of."""
MODEL = "smollm2-135m-instruct"
SUBJECTS = [
    "a river", "a lighthouse", "two brothers", "an old bridge", "the first snow", "a clockmaker", "a desert town", "a ship",
    "the night train", "a garden", "a lost letter", "the moon", "a violin", "a mountain pass", "a harbour", "a library",
]  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Server:
    """A server in a process group of its own."""

    port: int
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.perf_counter)

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def wait(self, path: str, timeout: float = 120) -> float:
        """Poll until `path` answers 200; the seconds since the process was started."""
        deadline = time.perf_counter() + timeout
        while time.perf_counter() < deadline:
            try:
                if self.get(path)[0] == 200:
                    return time.perf_counter() - self.started
            except (OSError, http.client.HTTPException):
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended with status {self.process.returncode}") from None
            time.sleep(0.002)
        raise TimeoutError(f"{path} did not answer 200 within {timeout} s")

    def wait_until_idle(self, model: str, timeout: float) -> None:
        """Until nothing of the model runs or waits; TimeoutError after `timeout` seconds.

        After ten times as many while the host takes cores away: a pass that has lost one of its two takes that much longer.
        """
        begun, before = time.perf_counter(), cpu_times()
        while True:
            _, status = self.get(f"/v1/models/{model}")
            if not status["running"] and not status["waiting"]:
                return
            patience = 10 if steal(before, cpu_times()) > 0.05 else 1
            if time.perf_counter() - begun > patience * timeout:
                raise TimeoutError(f"{model} is still busy after {patience * timeout} s: {status}")
            time.sleep(0.02)

    def worker_pid(self) -> int:
        """gunicorn's worker: the process that has the models."""
        return _children(self.process.pid)[0]

    def cpu_seconds(self) -> float:
        """What its processes have computed, without what the host took away meanwhile (proc(5), /proc/PID/stat)."""
        pids = [self.process.pid, *_children(self.process.pid)]
        ticks = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in pids]
        return sum(int(user) + int(system) for user, system in ticks) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def process(
    command: list[str], port: int, *, environ: dict[str, str] | None = None, log: Path | None = None
) -> Iterator[Server]:
    """A server that this command starts on that port, in a process of its own; what it says goes to `log`."""
    with (log or Path(os.devnull)).open("wb") as output:
        started = time.perf_counter()
        child = subprocess.Popen(command, env={**os.environ, **(environ or {})}, stdout=output, stderr=output)
    try:
        yield Server(port, child, started)
    finally:
        child.terminate()
        child.wait(60)


@contextmanager
def gunicorn(*arguments: str, environ: dict[str, str] | None = None, log: Path | None = None) -> Iterator[Server]:
    """A gunicorn on a free port."""
    port = free_port()
    command = [PYTHON, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", *arguments]
    with process(command, port, environ=environ, log=log) as server:
        yield server


@contextmanager
def bare_app() -> Iterator[Server]:
    """The least an app can be, on the same gunicorn."""
    with gunicorn("-k", "gthread", "--threads", "64", "--keep-alive", "75", "benchmarks.hello:app") as server:
        yield server


@contextmanager
def llmserve(
    config: str = "", *, wait: str | None = "/readyz", log: Path | None = None, environ: dict[str, str] | None = None
) -> Iterator[Server]:
    """llmserve with a configuration file of this text, once `wait` answers 200."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llmserve.toml"
        path.write_text(config)
        environ = {"LLMSERVE_CONFIG": str(path), **(environ or {})}
        with gunicorn("-c", "python:llmserve.gunicorn_conf", "llmserve.wsgi:app", environ=environ, log=log) as server:
            if wait:
                server.wait(wait)
            yield server


def post(port: int, path: str, body: object = None) -> tuple[int, Any]:
    """(status, JSON) of a POST."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def model_table(model_id: str = MODEL, **options: object) -> str:
    """A [[models]] table for the default model's file, run by ctransformers unless the options name another engine."""
    from llmserve.config import DEFAULT_MODEL

    options = {"engine": "ctransformers"} | options
    return table(id=model_id, source=DEFAULT_MODEL.source, sha256=DEFAULT_MODEL.sha256, **options)


def table(**options: object) -> str:
    """A [[models]] table. JSON's strings, numbers, booleans and lists are TOML's too."""
    return "[[models]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())


def model_path() -> Path:
    """The default model's file as ctransformers runs it, made if it is not there yet."""
    from llmserve.config import DEFAULT_MODEL, load
    from llmserve.models.loading import Loader

    return Loader(load().server).prepare(replace(DEFAULT_MODEL, engine="ctransformers")).model.path


def batch_model(**options: Any) -> BatchModel:
    """The default model as llama.cpp runs it in a server's process."""
    from llmserve.config import DEFAULT_MODEL, load
    from llmserve.engine import matmul
    from llmserve.models.batch_model import BatchModel
    from llmserve.models.loading import Loader

    matmul.process.claim()
    model = Loader(load().server).prepare(replace(DEFAULT_MODEL, engine="llamacpp", **options)).model
    assert isinstance(model, BatchModel)
    return model


@dataclass(frozen=True)
class Stream:
    """What a client saw of one stream. Times in seconds from the moment the request was sent."""

    times: tuple[float, ...]
    """Of each non-empty content."""
    total: float
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    finish_reason: str
    text: str

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def last(self) -> float:
        return self.times[-1]


def chat(port: int, content: str, max_tokens: int, *, system: str = "", **options: Any) -> Stream:
    """One streamed chat completion over a raw socket. The response cache is bypassed."""
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": content}]
    request = chat_request(messages, max_tokens, **options)
    with socket.create_connection(("127.0.0.1", port), timeout=600) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begun = time.perf_counter()
        connection.sendall(request)
        arrivals: list[tuple[float, bytes]] = []
        while piece := connection.recv(65536):
            arrivals.append((time.perf_counter() - begun, piece))
    return read_stream(arrivals)


def chat_request(
    messages: list[dict[str, str]], max_tokens: int, *, model: str = MODEL, store: bool = False, **options: Any
) -> bytes:
    """A deterministic, streamed chat completion on the wire. The response cache may `store` the answer, or is bypassed."""
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, **options}
    payload = json.dumps(body).encode()
    bypass = "" if store else "Cache-Control: no-store\r\n"
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"{bypass}Connection: close\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


def read_stream(arrivals: list[tuple[float, bytes]]) -> Stream:
    """What came, and when. Parsed afterwards, so that the client's own work is not in the way of what it measures."""
    if not arrivals or not arrivals[0][1].startswith(b"HTTP/1.1 200"):
        raise RuntimeError(b"".join(piece for _, piece in arrivals).decode(errors="replace")[:500])
    events: list[tuple[float, Any]] = []
    rest = b""
    for moment, piece in arrivals:
        *lines, rest = (rest + piece).split(b"\n")
        events += [(moment, json.loads(line[6:])) for line in lines if line.startswith(b"data: {")]
    choices = [(moment, choice) for moment, event in events for choice in event.get("choices", [])]
    contents = [(moment, content) for moment, choice in choices if (content := choice["delta"].get("content"))]
    if not contents:
        raise RuntimeError(f"a stream without content: {events[-1:]}")
    usage = next((event["usage"] for _, event in reversed(events) if event.get("usage")), {})
    return Stream(
        times=tuple(moment for moment, _ in contents),
        total=arrivals[-1][0],
        num_tokens=usage.get("completion_tokens", len(contents)),  # who tells nothing sends one at a time
        num_prompt_tokens=usage.get("prompt_tokens", 0),
        num_cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        finish_reason=next((choice["finish_reason"] for _, choice in choices if choice.get("finish_reason")), ""),
        text="".join(content for _, content in contents),
    )


def at_once(calls: list[Any]) -> tuple[list[Any], float]:
    """Run the calls in threads of their own; their results in order, and the seconds until the last was done."""
    results: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        results[number] = calls[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if None in results:
        raise RuntimeError("a client failed")
    return results, seconds


class Bare:
    """The process of bare loops: of ctransformers (`benchmarks.bare`) or of llama.cpp (`benchmarks.bare_batch`)."""

    def __init__(self, path: Path, module: str = "benchmarks.bare", *arguments: str) -> None:
        command = [PYTHON, "-m", module, str(path), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(
        self, splits: list[tuple[int, int]], prompts: list[list[int]], num_tokens: int, only: str = ""
    ) -> dict[str, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        command = {"splits": splits, "prompts": prompts, "num_tokens": num_tokens, "only": only}
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def story(number: int) -> str:
    return f"Write a very long story about {SUBJECTS[number % len(SUBJECTS)]}, in many chapters. Number {number}."


def random_prompts(lengths: list[int]) -> list[list[int]]:
    return [[1000 + (37 * number + 11 * position) % 40000 for position in range(n)] for number, n in enumerate(lengths)]


def pss(pid: int) -> dict[str, int]:
    """Proportional set size in bytes: in all, of private memory, of file mappings (proc(5), smaps_rollup)."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss")}
    return {"total": kib["Pss"] * 1024, "anon": kib["Pss_Anon"] * 1024, "file": kib["Pss_File"] * 1024}


def cpu_times() -> list[int]:
    """Clock ticks of all cores since boot: user, nice, system, idle, iowait, irq, softirq, steal (proc(5), /proc/stat)."""
    return [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


def steal(before: list[int], after: list[int]) -> float:
    """The share of the cores' time between two `cpu_times` that the host gave to other virtual machines."""
    passed = [later - earlier for earlier, later in zip(before, after, strict=True)]
    return passed[7] / max(1, sum(passed))
