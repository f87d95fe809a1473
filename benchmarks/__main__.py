"""python -m benchmarks [NAME …]: every figure as a ratio within one run, both sides in alternation, medians of several rounds.

Definitions. A stream's rate is (tokens − 1) / (last − first non-empty content). Rates of several streams together are
their completion tokens over the seconds from the first request sent to the last byte received, prefill included. The
response cache is bypassed except where it is what is measured.
"""

from __future__ import annotations

import compileall
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.figures import HEAD, Figure, calmest, paired
from benchmarks.harness import Bare, Server, at_once, chat, random_prompts, story
from llmserve.models.loading import has_llamacpp

_RESIDENT_KV_CACHE = 30 * 192 * 4096 + 30 * 192 * 2 * 150
"""Bytes of a slot's cache that 150 tokens make resident. Values are stored by channel (30 layers of 192), 2,048 positions or one
page of 4,096 bytes each, so a page of every channel is touched at once; keys are stored by position, 2 bytes a value."""

CORES = len(os.sched_getaffinity(0))
SPLITS = [(slots, CORES // slots) for slots in (1, 2, 4, 8) if CORES % slots == 0]


def one_stream(rounds: int = 7, num_tokens: int = 100) -> Iterator[Figure]:
    bare = Bare(harness.model_path())

    def measure(number: int) -> tuple[float, float]:
        stream = chat(server.port, story(number), num_tokens)
        seconds = bare([(1, CORES)], random_prompts([stream.num_prompt_tokens]), num_tokens, "decode")[f"1x{CORES}"]
        return (stream.num_tokens - 1) / (stream.last - stream.first), (num_tokens - 1) / seconds

    with harness.llmserve(harness.model_table()) as server:
        measure(0)
        ours, floor = paired(rounds, measure)
    bare.close()
    yield Figure("one stream, decode", "tokens/s", ours, floor, "bare loop", "≥ 0.95")


def _together(server: Server, bare: Bare, models: list[str], num_streams: int, rounds: int) -> tuple[list[float], list[float]]:
    """Rates of that many streams, spread over the models, and of the best bare split that does the same work."""
    num_tokens = 40

    def measure(number: int) -> tuple[float, dict[str, float]]:
        calls = [
            partial(chat, server.port, story(n + 16 * number), num_tokens, model=models[n % len(models)])
            for n in range(num_streams)
        ]
        streams, seconds = at_once(calls)
        prompts = random_prompts([stream.num_prompt_tokens for stream in streams])
        work = num_streams * num_tokens
        return work / seconds, {split: work / each for split, each in bare(SPLITS, prompts, num_tokens).items()}

    measured = calmest(rounds, measure)
    rates = {split: [floor[split] for _, floor in measured] for split in measured[0][1]}
    return [ours for ours, _ in measured], max(rates.values(), key=statistics.median)


def concurrent(rounds: int = 5) -> Iterator[Figure]:
    bare = Bare(harness.model_path())
    with harness.llmserve(harness.model_table(prefix_cache=False)) as server:
        _together(server, bare, [harness.MODEL], 4, rounds=1)  # every slot's memory is touched, on both sides
        for num_streams in (2, 4, 8, 16):
            ours, floor = _together(server, bare, [harness.MODEL], num_streams, rounds)
            yield Figure(f"{num_streams} streams together", "tokens/s", ours, floor, "best bare split", "≥ 0.95")
    bare.close()


def two_models(rounds: int = 5) -> Iterator[Figure]:
    bare = Bare(harness.model_path())
    tables = harness.model_table("one", prefix_cache=False) + harness.model_table("two", prefix_cache=False)
    with harness.llmserve(tables) as server:
        _together(server, bare, ["one", "two"], 8, rounds=1)
        ours, floor = _together(server, bare, ["one", "two"], 8, rounds)
    bare.close()
    yield Figure("8 streams over two models", "tokens/s", ours, floor, "best bare split", "≥ 0.95")


def shared_prefix(rounds: int = 3) -> Iterator[Figure]:
    rules = " ".join(f"Rule {n}: always be polite, brief and exact, and never speak of topic number {n}." for n in range(21))

    def seconds_of(model: str, number: int) -> float:
        system = f"You are assistant number {number}. {rules}"  # another prefix each round: a cold cache
        calls = [partial(chat, server.port, f"Name {n}?", 16, system=system, model=model) for n in range(16)]
        return at_once(calls)[1]

    tables = harness.model_table("with") + harness.model_table("without", prefix_cache=False)
    with harness.llmserve(tables) as server:
        reused, fresh = paired(rounds, lambda number: (seconds_of("with", number), seconds_of("without", number)))
    yield Figure("16 requests, one 400-token system prompt", "s", reused, fresh, "without reuse", "≤ 0.5")


def repeated(rounds: int = 5) -> Iterator[Figure]:
    """A deterministic request again, over one kept-alive connection."""

    def measure(number: int) -> tuple[float, float]:
        request = _request(server.port, story(number), 64)
        return _exchange(server.port, [request])[0], statistics.median(_exchange(server.port, [request] * 20))

    with harness.llmserve(harness.model_table()) as server:
        first, again = paired(rounds, measure)
    yield Figure("first answer against the repeated one", "s", first, again, "cached", "≥ 100")


def cached_rate(rounds: int = 7, seconds: float = 2.0) -> Iterator[Figure]:
    with harness.llmserve(harness.model_table()) as server, harness.bare_app() as hello:
        hello.wait("/")
        request = _request(server.port, story(0), 16)
        _exchange(server.port, [request])
        plain = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{hello.port}\r\n\r\n".encode()
        ours, floor = paired(rounds, lambda _: (_rate(server.port, seconds, request), _rate(hello.port, seconds, plain)))
    yield Figure("cached answers", "requests/s", ours, floor, "bare app", "≥ 0.5")


def start(rounds: int = 9) -> Iterator[Figure]:
    """With every module compiled, as pip leaves those of gunicorn and werkzeug, and a first start leaves ours."""

    def measure(_: int) -> tuple[float, float]:
        with harness.bare_app() as hello:
            floor = hello.wait("/health")
        with harness.llmserve(harness.model_table(), wait=None) as server:
            return server.wait("/health"), floor

    def first_token(_: int) -> tuple[float, float]:
        with harness.llmserve(harness.model_table(), wait="/health") as server:
            begun = time.perf_counter() - server.started
            return begun + chat(server.port, "Hello", 2).first, 1.0

    harness.model_path()
    for package in ("llmserve", "benchmarks"):
        compileall.compile_dir(package, quiet=1)
    health, floor = paired(rounds, measure)
    yield Figure("process start to /health", "s", health, floor, "bare app", "≤ 2")
    first, one = paired(rounds, first_token)
    yield Figure("process start to first token", "s", first, one, "one second", "≤ 2")


def memory() -> Iterator[Figure]:
    """PSS of gunicorn's two processes, less the weights' mapping and the KV caches as far as they are resident."""
    with harness.llmserve(harness.model_table()) as server:
        at_once([partial(chat, server.port, story(n), 100) for n in range(8)])
        _, status = server.get(f"/v1/models/{harness.MODEL}")
        worker = server.worker_pid()
        total = sum(harness.pss(pid)["total"] for pid in (server.process.pid, worker))
        beside = total - _resident(worker, ".gguf") - status["slots"] * _RESIDENT_KV_CACHE
    yield Figure("memory beside weights and KV caches", "MB", [beside / 1e6], [1.0], "one MB", "≤ 120")


def isolation(rounds: int = 7) -> Iterator[Figure]:
    """Each model twice in one server, as a process of its own and as threads, in alternation. Without drafts, for how many there
    are depends on how long passes took."""
    for engine in ("ctransformers", "llamacpp") if has_llamacpp() else ("ctransformers",):
        ways, options = ("process", "thread"), {"slots": 8, "prefix_cache": False, "prompt_lookup": False}
        tables = [harness.model_table(way, isolation=way, engine=engine, **options) for way in ways]

        def rate(model: str, num_streams: int, number: int) -> float:
            num_tokens = 128 if num_streams == 1 else 48
            calls = [partial(chat, server.port, story(n + 16 * number), num_tokens, model=model) for n in range(num_streams)]
            streams, seconds = at_once(calls)
            alone = (streams[0].num_tokens - 1) / (streams[0].last - streams[0].first)
            return alone if num_streams == 1 else sum(stream.num_tokens for stream in streams) / seconds

        def first(model: str, number: int) -> float:
            return statistics.median(chat(server.port, f"{number}", 1, model=model).first for _ in range(5))

        with harness.llmserve("".join(tables)) as server:
            for way in ways:
                rate(way, 8, 0)
            for num_streams in (1, 8):
                ours, other = paired(rounds, lambda n, s=num_streams: (rate("process", s, n), rate("thread", s, n)))  # type: ignore[misc]
                yield Figure(f"{num_streams} streams in a process, {engine}", "tokens/s", ours, other, "in threads", "≥ 0.97")
            ours, other = paired(
                2 * rounds + 1, lambda n: (first("process", n), first("thread", n))
            )  # it varies by twice the limit
            added = [1000 * (process - thread) for process, thread in zip(ours, other, strict=True)]
            yield Figure(f"first token in a process, {engine}, more", "ms", added, [1.0], "one ms", "≤ 5")
        totals = []
        for table in tables:
            with harness.llmserve(table) as server:
                at_once([partial(chat, server.port, story(n), 48, model=ways[len(totals)]) for n in range(8)])
                totals.append(_beside_weights(server.worker_pid()))
        yield Figure(f"memory of a process, {engine}, more", "MB", [(totals[0] - totals[1]) / 1e6], [1.0], "one MB", "≤ 60")


def _beside_weights(worker: int) -> int:
    """PSS in bytes of a worker and its engines' processes, less the weights' mappings."""
    children = [int(pid) for path in Path(f"/proc/{worker}/task").glob("*/children") for pid in path.read_text().split()]
    return sum(harness.pss(pid)["total"] - _resident(pid, ".gguf") for pid in (worker, *children))


def _request(port: int, content: str, max_tokens: int) -> bytes:
    body = {
        "model": harness.MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    payload = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


def _exchange(port: int, requests: list[bytes]) -> list[float]:
    """Seconds of each request over one connection."""
    import socket

    from benchmarks.load import length_of

    times = []
    with socket.create_connection(("127.0.0.1", port), timeout=600) as connection:
        for request in requests:
            begun = time.perf_counter()
            connection.sendall(request)
            received = b""
            while b"\r\n\r\n" not in received or len(received) < received.find(b"\r\n\r\n") + 4 + length_of(received):
                received += connection.recv(65536)
            times.append(time.perf_counter() - begun)
            if not received.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(received.decode(errors="replace"))
    return times


def _rate(port: int, seconds: float, request: bytes) -> float:
    command = [harness.PYTHON, "-m", "benchmarks.load", str(port), str(seconds), "4"]
    return float(subprocess.run(command, input=request, capture_output=True, check=True).stdout)


def _mappings(pid: int) -> list[tuple[int, str, int]]:
    """(size, file name, PSS) in bytes of each mapping (proc(5), smaps)."""
    found = []
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text()):
        head, *lines = block.splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
        name = head.split(maxsplit=5)[5] if len(head.split(maxsplit=5)) == 6 else ""
        found.append((sizes["Size"], name, sizes["Pss"]))
    return found


def _resident(pid: int, suffix: str) -> int:
    return sum(pss for _, name, pss in _mappings(pid) if name.endswith(suffix))


MEASURES: dict[str, Callable[[], Iterator[Figure]]] = {
    measure.__name__: measure
    for measure in (one_stream, concurrent, two_models, shared_prefix, repeated, cached_rate, start, memory, isolation)
}


def main(names: list[str]) -> int:
    figures = []
    for name in names or MEASURES:
        print(f"{name} …", file=sys.stderr)
        for figure in MEASURES[name]():
            figures.append(figure)
            print(figure.row(), file=sys.stderr)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    report = HEAD + "\n".join(figure.row() for figure in figures) + "\n"
    stamp = f"{'-'.join(names) or 'all'}"
    (folder / f"{stamp}.md").write_text(report)
    (folder / f"{stamp}.json").write_text(
        json.dumps([asdict(figure) | {"ratio": figure.ratio} for figure in figures], indent=1)
    )
    print(report)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
