"""Real servers, real faults, and the table of what came of them: FAULTS_REPORT names the file that it is written to."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import harness
from llmserve.models.loading import has_llamacpp
from tests.faults.clients import Bystander, wait_for
from tests.tiny_models import write_llama_bpe, write_llama_spm

VICTIM, BYSTANDER, TINY, VECTORS = "victim", "bystander", "tiny", "vectors"
HEAD = """# What the server survives

`make faults` breaks these things around a real server, with engines in processes of their own, and writes this table. Recovered: from the fault to the next whole answer.

{num_cores} cores, of which the host took {stolen:.0%} away; load average {load:.1f} at the end.

| fault | what clients saw | recovered after | longest gap of another model's stream | lost |
|---|---|---|---|---|
"""
ROWS: list[str] = []
HANG = signal.SIGUSR1
_HANGS = f"""import ctypes, signal
signal.signal({int(HANG)}, lambda *_: ctypes.PyDLL(None).sleep(3600))
"""  # with the GIL held


@pytest.fixture(scope="session", autouse=True)
def report():
    before = harness.cpu_times()
    yield
    path = os.environ.get("FAULTS_REPORT")
    if path and ROWS:
        stolen = harness.steal(before, harness.cpu_times())
        head = HEAD.format(num_cores=os.cpu_count(), stolen=stolen, load=os.getloadavg()[0])
        Path(path).write_text(head + "\n".join(sorted(ROWS)) + "\n", encoding="utf-8")


@pytest.fixture
def note():
    """Add a row to the table."""

    def note(fault, saw, recovered=None, gap=None, lost="nothing"):
        seconds = ["–" if value is None else f"{value:.2f} s" for value in (recovered, gap)]
        ROWS.append(f"| {fault} | {saw} | {seconds[0]} | {seconds[1]} | {lost} |")
        print(ROWS[-1])

    return note


class Running:
    """A server under load: a model that faults happen to, another one that streams all the time, and a tiny one."""

    def __init__(self, server, folder):
        self.server = server
        self.folder = folder
        self.port = server.port

    def worker(self):
        return self.server.worker_pid()

    def engine(self, model):
        """The process id of a model's engine, None if there is none."""
        return engine_of(self.worker(), model)

    def status(self, model):
        return self.server.get(f"/v1/models/{model}")[1]

    def crashes(self, model):
        """How often the server has noticed that its engine died."""
        return self.status(model)["statistics"]["crashes"]

    def ready(self, model):
        assert harness.post(self.port, f"/v1/models/{model}?action=load")[0] == 200

    @contextmanager
    def bystander(self):
        """Another model's stream, before, during and after the block, whose gaps are measured; and what share of the cores' time
        neither it nor the rest of the test has had (`stolen`)."""
        stream = Bystander(self.port, BYSTANDER)
        stream.start()
        assert stream.flowing.wait(60)
        before, own_before = harness.cpu_times(), self._own_ticks()
        try:
            yield stream
        finally:
            stream.finish()
        after = harness.cpu_times()
        passed = sum(after) - sum(before)
        idle = sum(after[3:5]) - sum(before[3:5])
        stream.stolen = (passed - idle - (self._own_ticks() - own_before)) / passed

    def _own_ticks(self):
        """What the test, the server and its engines have taken, those that have died too."""
        worker = self.worker()
        engines = [pid for path in Path(f"/proc/{worker}/task").glob("*/children") for pid in path.read_text().split()]
        times = os.times()
        own = round((times.user + times.system) * os.sysconf("SC_CLK_TCK"))
        return own + ticks(worker, reaped=True) + sum(ticks(pid) for pid in engines)


def ticks(pid, *, reaped=False):
    """Clock ticks of a process, and of its children that have ended (proc(5), /proc/PID/stat)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11 : 15 if reaped else 13]))


def engine_of(worker, model):
    for pid in Path(f"/proc/{worker}/task").glob("*/children"):
        for child in pid.read_text().split():
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"llmserve.models.child" in command and model.encode() in command:
                return int(child)
    return None


@pytest.fixture(scope="session")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    write_llama_spm(folder / "tiny.gguf")
    write_llama_bpe(folder / "other.gguf")
    process = {"isolation": "process", "prefix_cache": False}
    config = harness.model_table(VICTIM, **process)
    config += harness.model_table(BYSTANDER, engine="llamacpp" if has_llamacpp() else "ctransformers", slots=2, **process)
    config += harness.table(id=TINY, source=str(folder / "tiny.gguf"), engine="ctransformers", slots=8, **process)
    config += harness.table(id=VECTORS, source=str(folder / "tiny.gguf"), load="on_demand", task="embed", **process)
    (folder / "sitecustomize.py").write_text(_HANGS)
    with harness.llmserve(config, log=folder / "log", environ={"PYTHONPATH": str(folder)}) as server:
        yield Running(server, folder)
    print((folder / "log").read_text()[-4000:])


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """After every fault all slots are free, and the server is well."""
    yield
    if "running" in request.fixturenames:
        running = request.getfixturevalue("running")
        for model in (VICTIM, BYSTANDER, TINY, VECTORS):
            wait_for(lambda model=model: running.status(model)["state"] != "loading", 30)
            running.server.wait_until_idle(model, timeout=3.0)
        assert running.server.get("/livez")[0] == 200


def patience(stolen):
    """How much longer things may take while the host or other programs take a share of the cores."""
    return 30 if stolen > 0.05 or os.getloadavg()[0] > 1.5 * os.cpu_count() + 2 else 1


def seconds_since(begun):
    return time.monotonic() - begun
