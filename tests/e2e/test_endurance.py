"""Many requests and many loads: nothing may be left of them."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import harness
from tests.e2e.conftest import MODEL
from tests.tiny_models import write_llama_spm

TINY = "tiny"
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"


def send(port, body, *, leave_after=None):
    """Send a chat; the raw answer, or what came of it before the client left after that many bytes."""
    payload = json.dumps(body).encode()
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        while leave_after is None or len(received) < leave_after:
            piece = connection.recv(65536)
            if not piece:
                break
            received += piece
    return received


def request(rng):
    """A mix: streams and not, greedy and drawn, cached and not, one choice and several, mistakes too."""
    body = {
        "model": rng.choice([MODEL, TINY, TINY]),
        "messages": [{"role": "user", "content": f"{rng.choice(['Count', 'List', 'Name'])} {rng.randrange(200)} things."}],
        "max_tokens": rng.choice([1, 2, 4, 8]),
        "stream": rng.random() < 0.5,
        "temperature": rng.choice([0, 0, 0.7, 1.3]),
    }
    if rng.random() < 0.2:
        body["n"] = 2
    if rng.random() < 0.2:
        body["stop"] = ["e", " the"]
    if rng.random() < 0.1:
        body |= rng.choice([{"temperature": 9}, {"model": "none"}, {"max_tokens": 10**6}, {"messages": []}])
    return body


def run_mix(port, count, seed):
    rng = random.Random(seed)
    requests = [(request(rng), rng.choice([0, 1, 250, 500]) if rng.random() < 0.2 else None) for _ in range(count)]

    def one(item):
        body, leave_after = item
        raw = send(port, body, leave_after=leave_after)
        return raw[9:12] if leave_after is None else None

    with ThreadPoolExecutor(12) as pool:
        statuses = [status for status in pool.map(one, requests) if status is not None]
    assert set(statuses) <= {b"200", b"400", b"404"}, set(statuses)
    return statuses


def facts(server):
    """(threads, file descriptors, PSS in bytes) of the worker."""
    pid = server.worker_pid()
    threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return threads, descriptors, harness.pss(pid)["total"]


def test_two_thousand_mixed_requests_leave_nothing(tmp_path):
    tiny = write_llama_spm(tmp_path / "tiny.gguf")
    config = "[cache]\nmax_entries = 50\n" + harness.model_table() + harness.table(id=TINY, source=str(tiny))
    with harness.llmserve(config) as server:
        run_mix(server.port, 400, seed=0)
        before = facts(server)
        statuses = run_mix(server.port, 2000, seed=1)
        assert len(statuses) > 1500
        for model in (MODEL, TINY):
            server.wait_until_idle(model, timeout=2.0)
        after = facts(server)
    print(f"before {before}, after {after}")
    assert after[0] <= before[0] + 12  # gunicorn starts its pool's threads as it needs them and keeps them
    assert abs(after[1] - before[1]) <= 12
    assert after[2] <= before[2] * 1.05


def test_thirty_loads_and_unloads_leave_nothing(tmp_path):
    with harness.llmserve(harness.model_table()) as server:

        def cycle():
            for action in ("unload", "load"):
                assert harness.post(server.port, f"/v1/models/{MODEL}?action={action}")[0] == 200
            assert harness.chat(server.port, "Hello", 4).num_tokens

        for _ in range(10):  # the allocator's arenas have grown to what a load needs then, and hold now more of it, now less
            cycle()
        seen = []
        for _ in range(35):
            cycle()
            seen.append(facts(server))
    before, after = seen[:5], seen[-5:]
    print(f"before {before}, after {after}")
    assert all(abs(a - b) <= 2 for a, b in zip(after[-1][:2], before[-1][:2], strict=True))
    assert min(pss for *_, pss in after) <= max(pss for *_, pss in before) * 1.05
