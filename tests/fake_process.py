"""An engine's process that is two threads of the test, on a fake backend: everything between them is the real protocol and socket."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import replace

from llmserve.config import ModelSpec
from llmserve.engine.channel import Channel, Open, Opened
from llmserve.engine.child import EngineChild
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.engine import EngineSettings
from llmserve.engine.process_engine import ProcessEngine
from llmserve.engine.statistics import StatisticsCounter
from llmserve.errors import EngineDied
from tests.fakes import TEMPLATE, ChatTemplate, FakeBackend, byte_tokenizer, info_of, make_engine, vectors_of

TIMEOUT = 10.0


class FakeProcess:
    """Stands for `EngineProcess`: one thread lives the child's life, the other has the server's end."""

    def __init__(self, backends, cores=2):
        self._backends = backends
        ours, self._theirs = socket.socketpair()
        self._channel = Channel(ours)
        self._closing = False
        self._is_open = threading.Event()
        self._attached = threading.Event()
        self._child = EngineChild(Channel(self._theirs), self._open)
        self.over = threading.Event()
        self._threads = [threading.Thread(target=self._live), threading.Thread(target=self._watch)]
        for thread in self._threads:
            thread.start()
        self.send(Open(None, cores, 30))
        assert self._is_open.wait(TIMEOUT)

    def attach(self, owner):
        self._owner = owner
        self._attached.set()

    def send(self, message):
        self._channel.send(message)

    def crash(self):
        """What is left of a process when it dies: the end of its socket."""
        with suppress(OSError):
            self._theirs.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._closing = True
        self.crash()
        self._attached.set()
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join(TIMEOUT)
                assert not thread.is_alive()

    def _open(self, message, budget):
        self.engine = make_engine(self._backends, budget=budget, max_waiting=info_of(self._backends).num_slots)
        return self.engine

    def _live(self):
        self._child.run()
        self._child._budget.grant(100)  # so that the threads of an engine that has none any more come to their end
        self.engine.close()
        self._theirs.close()

    def _watch(self):
        while True:
            try:
                messages = self._channel.receive()
            except EOFError:
                break
            for message in messages:
                if isinstance(message, Opened):
                    self._is_open.set()
                    self._attached.wait(TIMEOUT)
                elif message.__class__.__name__ != "Beat":
                    self._owner.receive(message)
            if self._attached.is_set() and not self._closing:
                self._owner.turn()
            if not messages:
                threading.Event().wait(0.001)
        self._channel.close()
        if not self._closing:
            self._owner.died(EngineDied("The model's engine ended: it was told to."))
        self.over.set()


def make_process_engine(backends, *, budget=None, info=None, statistics=None, **settings):
    process = FakeProcess(backends)
    engine = ProcessEngine(
        info or info_of(backends),
        process,
        byte_tokenizer(),
        ChatTemplate(TEMPLATE),
        budget or ComputeBudget(2),
        EngineSettings(**settings),
        statistics,
        vectors=vectors_of(backends),
    )
    return engine, process


class FakeProcessLoader:
    """A `ModelLoader` of such engines, all on one budget."""

    def __init__(self, make_backends=lambda: [FakeBackend(), FakeBackend()], **settings):
        self.budget = ComputeBudget(2)
        self.processes = []
        self.engines = []
        self._make_backends = make_backends
        self._settings = settings

    def prepare(self, spec: ModelSpec):
        return self

    memory_bytes = 1100

    def open(self, statistics: StatisticsCounter):
        backends = self._make_backends()
        info = replace(info_of(backends), identity=str(len(self.engines)), weights_bytes=1100, kv_cache_bytes=0)
        engine, process = make_process_engine(backends, budget=self.budget, info=info, statistics=statistics, **self._settings)
        self.engines.append(engine)
        self.processes.append(process)
        return engine
