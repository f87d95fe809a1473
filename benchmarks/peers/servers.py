"""The servers that are compared, started on one file with equal threads, slots and context; and the environment of the peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness
from benchmarks.harness import Server

_LAUNCHER = Path(__file__).with_name("launch.py")
_ENVIRONMENT = Path(__file__).parents[1] / "results" / "venv"
_PYTHON = _ENVIRONMENT / "bin" / "python"


class Setup(NamedTuple):
    """What all have in common. `repack`: whether llama-cpp-python runs the file with its weights rearranged for this CPU."""

    model: Path
    threads: int
    slots: int
    context_length: int
    repack: bool
    logs: Path


class Peer(NamedTuple):
    """`distribution` is what the package index calls it, `ready` answers 200 when it can be used."""

    distribution: str
    requirement: str
    ready: str
    note: str


LLMSERVE = "llmserve"
PEERS = {
    "llama-server": Peer(
        "xllamacpp", "xllamacpp", "/health", "continuous batching, prompt cache and batch sizes as by default"
    ),
    "llama_cpp.server": Peer(
        "llama_cpp_python",
        "llama-cpp-python[server]",
        "/v1/models",
        "one request at a time; interrupt_requests off",
    ),
}
NAMES = [LLMSERVE, *PEERS]


def set_up(logs: Path, threads: int, slots: int) -> Setup:
    model = harness.batch_model(weights="file")
    return Setup(model.path, threads, slots, 2048, model.repack, logs)


@contextmanager
def start(name: str, setup: Setup) -> Iterator[Server]:
    """The server, once it can be used."""
    log = setup.logs / f"{name}.log"
    if name == LLMSERVE:
        with harness.llmserve(_config(setup), log=log) as server:
            yield server
        return
    port = harness.free_port()
    options = setup._asdict() | {"model": str(setup.model), "port": port, "repack": repacks(name, setup)}
    del options["logs"]
    command = [str(_PYTHON), str(_LAUNCHER), name, json.dumps(options)]
    with harness.process(command, port, log=log) as server:
        server.wait(PEERS[name].ready)
        yield server


def repacks(name: str, setup: Setup) -> bool:
    """llama-server brings a library of its own; the others share the one that was tried."""
    return name == "llama-server" or setup.repack


def describe(name: str, setup: Setup) -> str:
    layout = "rearranged where the library can" if repacks(name, setup) else "not rearranged"
    if name == LLMSERVE:
        what = f"llmserve {version('llmserve')} on llama-cpp-python {version('llama-cpp-python')}: {harness.batch_model().info.reason}"
    else:
        peer = PEERS[name]
        code = f"from importlib.metadata import version; print(version({peer.distribution!r}))"
        found = subprocess.run([_PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        what = f"{peer.distribution} {found}: {peer.note}"
    waiting = "".join(f"; {key}={value}" for key, value in os.environ.items() if key.startswith(("OMP_", "GOMP_")))
    return f"{what}; {setup.threads} threads, {setup.slots} slots; weights {layout}{waiting}"


def install(names: list[str]) -> None:
    """Put the peers into an environment of their own, if they are not there."""
    requirements = [_requirement(PEERS[name]) for name in names if name in PEERS]
    if not requirements:
        return
    if not _PYTHON.exists():
        venv.create(_ENVIRONMENT, with_pip=True)
    print(f"installing {', '.join(requirements)} …", file=sys.stderr)
    subprocess.run([_PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check", *requirements], check=True)


def _requirement(peer: Peer) -> str:
    """The newest, but of the library that llmserve has itself: the same."""
    return f"{peer.requirement}=={version('llama-cpp-python')}" if "llama-cpp" in peer.requirement else peer.requirement


def _config(setup: Setup) -> str:
    server = f"[server]\ncores = {setup.threads}\nthreads = 128\n"
    options = {"engine": "llamacpp", "slots": setup.slots, "context_length": setup.context_length, "max_waiting": 96}
    return server + harness.model_table(**options)
