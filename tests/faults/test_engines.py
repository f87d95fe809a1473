"""What kills or stops an engine's process, at each phase of its life, while another model streams."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from benchmarks import harness
from tests.faults.clients import LONG, Client, ask, wait_for
from tests.faults.conftest import BYSTANDER, HANG, TINY, VECTORS, VICTIM, engine_of, patience, seconds_since

NUM_CRASHES = 200
DIED = {"503 engine_died", "200, then an error event (engine_died)"}
PHASES = ["loading", "prefill", "decode", "idle"]
SIGNALS = [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP, HANG]
CASES = [case for case in product(PHASES, SIGNALS) if case != ("loading", HANG)]  # imports may hold the GIL for long


def load_and_hit(running, number):
    """Send the signal to a process that loads; the status and reason that whoever asked for the load got."""
    harness.post(running.port, f"/v1/models/{VICTIM}?action=unload")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(harness.post, running.port, f"/v1/models/{VICTIM}?action=load")
        wait_for(lambda: running.engine(VICTIM))
        os.kill(running.engine(VICTIM), number)
        begun = time.monotonic()
        status, body = answer.result(60)
    return f"{status} {body['error']['code']}" if status != 200 else "200", begun


def answer_and_hit(running, number, phase):
    """Send it to a process that is at that phase of an answer, streamed and not; what the clients got."""
    running.ready(VICTIM)
    assert ask(running.port, VICTIM) == "200"
    content = LONG if phase == "prefill" else "Write a very long story."
    clients = [Client(running.port, VICTIM, content, stream=stream, max_tokens=500) for stream in (True, False)]
    wait_for(lambda: running.status(VICTIM)["running"] == 2)
    if phase == "decode":
        assert clients[0].flowing.wait(60)
    os.kill(running.engine(VICTIM), number)
    begun = time.monotonic()
    return "; ".join(dict.fromkeys(client.outcome() for client in clients)), begun


@pytest.mark.parametrize(("phase", "number"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_signal(running, note, phase, number):
    with running.bystander() as bystander:
        if phase == "loading":
            saw, begun = load_and_hit(running, number)
            noticed = seconds_since(begun)
            lost = "the load, which failed with the reason"
            assert saw == "503 model_load_failed"
            running.ready(VICTIM)
        elif phase == "idle":
            running.ready(VICTIM)
            assert ask(running.port, VICTIM) == "200"
            num_crashes = running.crashes(VICTIM)
            os.kill(running.engine(VICTIM), number)
            begun, saw, lost = time.monotonic(), "nothing", "nothing"
            wait_for(lambda: running.crashes(VICTIM) > num_crashes)  # a client that came before would share its fate
            noticed = seconds_since(begun)
        else:
            saw, begun = answer_and_hit(running, number, phase)
            noticed = seconds_since(begun)
            lost = "the answers in flight on it"
            assert set(saw.split("; ")) <= DIED
        assert ask(running.port, VICTIM) == "200"
        recovered = seconds_since(begun)
    what = "a hang with the GIL held" if number == HANG else number.name
    note(f"{what} of an engine, {phase}", saw, recovered, bystander.longest_gap, lost)
    assert set(bystander.outcomes) == {"200"}
    much = patience(bystander.stolen)
    assert noticed <= 1.0 * much
    assert recovered <= 2.0 * much
    assert bystander.longest_gap <= 1.0 * much


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_signal_to_an_engine_of_vectors(running, note, number):
    """While one request is worked on and others wait: each gets its one answer, and the next request its vectors."""
    texts = {"model": VECTORS, "input": [[5] * 200] * 1000}
    few = {"model": VECTORS, "input": ["hello", "river"]}
    running.ready(VECTORS)
    status, vectors = harness.post(running.port, "/v1/embeddings", few)
    assert status == 200
    worker = running.worker()
    before = facts(worker)
    with running.bystander() as bystander, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(harness.post, running.port, "/v1/embeddings", texts) for _ in range(4)]
        wait_for(lambda: sum(running.status(VECTORS)[key] for key in ("running", "waiting")) == 4)
        os.kill(running.engine(VECTORS), number)
        begun = time.monotonic()
        outcomes = [answer.result(60) for answer in answers]
        noticed = seconds_since(begun)
        assert harness.post(running.port, "/v1/embeddings", few) == (200, vectors)
        recovered = seconds_since(begun)
    saw = "; ".join(dict.fromkeys(f"{status} {body['error']['code']}" for status, body in outcomes))
    note(f"{number.name} of an engine of vectors", saw, recovered, bystander.longest_gap, "the requests in flight on it")
    assert saw == "503 engine_died"
    much = patience(bystander.stolen)
    assert noticed <= 1.0 * much
    assert recovered <= 2.0 * much
    assert bystander.longest_gap <= 1.0 * much
    wait_for(lambda: facts(worker)[1] <= before[1])
    assert facts(worker)[2] == before[2]


def test_a_memory_limit(running, note):
    """No more memory for the engine than it has: allocations fail, in Python and in native code."""
    running.ready(VICTIM)
    pid = running.engine(VICTIM)
    with running.bystander() as bystander:
        with open(f"/proc/{pid}/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (size, size))
        clients = [Client(running.port, VICTIM, LONG[:900], max_tokens=8) for _ in range(3)]
        outcomes = {client.outcome() for client in clients}
        begun = time.monotonic()
        assert harness.post(running.port, f"/v1/models/{VICTIM}?action=unload")[0] == 200
        running.ready(VICTIM)
        assert ask(running.port, VICTIM) == "200"
        recovered = seconds_since(begun)
    note(
        "no memory left for an engine", ", ".join(sorted(outcomes)), recovered, bystander.longest_gap, "answers that needed it"
    )
    assert outcomes <= {"200", "503 engine_died", "500 engine_failed"}
    assert bystander.longest_gap <= patience(bystander.stolen)


def test_the_servers_descriptors_are_used_up(running, note):
    """An engine that dies then cannot be started again, and is as soon as there are some."""
    running.ready(TINY)
    worker = running.worker()
    limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    with running.bystander() as bystander:
        used = len(os.listdir(f"/proc/{worker}/fd"))
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (used + 1, limits[1]))
        os.kill(running.engine(TINY), signal.SIGKILL)
        wait_for(lambda: running.engine(TINY) is None)
        time.sleep(0.5)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
        begun = time.monotonic()
        saw = ask(running.port, TINY)
        running.ready(TINY)
        assert ask(running.port, TINY) == "200"
        recovered = seconds_since(begun)
    note("file descriptors exhausted as an engine dies", saw, recovered, bystander.longest_gap, "nothing")
    assert bystander.longest_gap <= patience(bystander.stolen)


@pytest.mark.parametrize("how", ["truncated", "replaced", "deleted"])
def test_a_file_that_changes_while_it_is_loaded(running, note, how):
    path = running.folder / "tiny.gguf"
    backup = shutil.copy(path, running.folder / "backup")
    running.ready(TINY)
    with running.bystander() as bystander:
        if how == "truncated":
            os.truncate(path, path.stat().st_size // 2)
        elif how == "replaced":
            os.replace(shutil.copy(running.folder / "other.gguf", running.folder / "new"), path)
        else:
            path.unlink()
        saw = ask(running.port, TINY)
        harness.post(running.port, f"/v1/models/{TINY}?action=unload")
        status, body = harness.post(running.port, f"/v1/models/{TINY}?action=load")
        again = "a load takes the new file" if status == 200 else f"a load says: {body['error']['message']}"
        os.replace(backup, path)
        begun = time.monotonic()
        harness.post(running.port, f"/v1/models/{TINY}?action=reload")
        assert ask(running.port, TINY) == "200"
        recovered = seconds_since(begun)
    note(f"a loaded file is {how}", f"{saw}; {again.replace(str(running.folder) + '/', '')}", recovered, bystander.longest_gap)
    assert saw == "200" or (how == "truncated" and "engine_died" in saw)
    assert (status == 200) == (how == "replaced")
    assert bystander.longest_gap <= patience(bystander.stolen)


def test_the_worker_is_killed(running, note):
    """gunicorn starts another; no engine outlives the one that had it."""
    worker = running.worker()
    engines = [engine_of(worker, model) for model in (VICTIM, BYSTANDER)]
    os.kill(worker, signal.SIGKILL)
    begun = time.monotonic()
    wait_for(lambda: not any(engine and os.path.exists(f"/proc/{engine}") for engine in engines), 10)
    gone = seconds_since(begun)
    running.server.wait("/readyz")
    assert ask(running.port, VICTIM) == "200"
    note(
        "SIGKILL of the server",
        f"closed; its engines are gone after {gone:.2f} s",
        seconds_since(begun),
        lost="everything in flight",
    )


FACTS = ("threads", "descriptors", "processes", "MB")


def facts(worker):
    """Threads, descriptors, children and memory of the server."""
    children = sum(len(path.read_text().split()) for path in Path(f"/proc/{worker}/task").glob("*/children"))
    return (
        len(os.listdir(f"/proc/{worker}/task")),
        len(os.listdir(f"/proc/{worker}/fd")),
        children,
        harness.pss(worker)["anon"] // 10**6,
    )


def test_crashes_in_a_row_leave_nothing(running, note):
    """Nothing that a process can hold. Each hits an engine that answers."""
    running.ready(TINY)
    worker = running.worker()
    temporary = set(os.listdir(tempfile.gettempdir()))
    begun = time.monotonic()
    before = None
    for number in range(NUM_CRASHES):
        if number == 10:  # its thread pool is as large as it gets
            before = facts(worker)
        clients = [Client(running.port, TINY, stream=stream, n=4, max_tokens=150) for stream in (True, False, True)]
        wait_for(lambda: running.status(TINY)["running"] == 3)
        os.kill(running.engine(TINY), signal.SIGKILL if number % 2 else signal.SIGSEGV)
        assert {client.outcome() for client in clients} <= DIED
        assert ask(running.port, TINY) == "200"
    pace = seconds_since(begun) / NUM_CRASHES
    wait_for(lambda: facts(worker)[1] <= before[1])  # those of a connection that was just closed
    after = facts(worker)
    saw = "; ".join(f"{name} {one} → {other}" for name, one, other in zip(FACTS, before, after, strict=True))
    note(f"{NUM_CRASHES} crashes in a row under load", saw, pace, lost="what was in flight")
    assert after[0] <= before[0] + 2
    assert after[2] == before[2]
    assert running.engine(TINY)
    assert not {name for name in set(os.listdir(tempfile.gettempdir())) - temporary if "llmserve" in name}
