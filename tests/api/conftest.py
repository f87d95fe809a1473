"""An app on fake engines, and a client that speaks WSGI to it."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count

import pytest
from werkzeug.test import Client

from llmserve import create_app
from llmserve.app import App
from llmserve.config import Config, ModelSpec, ServerConfig
from llmserve.registry import ModelRegistry
from tests.fakes import TEMPLATE, FakeBackend, FakeLoader, babble

CHAT = "/v1/chat/completions"
MODEL = "org/fake"
ALIAS = "gpt-4"
TIMEOUT = 10.0  # seconds; what takes longer will never happen


@dataclass(frozen=True, slots=True)
class Served:
    """An app with one model of one slot, which its first use loads."""

    app: App
    client: Client
    registry: ModelRegistry
    loader: FakeLoader

    def chat(self, content="Hello", *, headers=None, **parameters):
        """The answer, read to its end and closed."""
        return self.client.post(CHAT, json=chat_body(content, **parameters), headers=headers, buffered=True)

    @property
    def backend(self) -> FakeBackend:
        self.registry.load(MODEL)
        return self.loader.backends[-1]

    @property
    def status(self):
        return self.registry.status(MODEL)

    def wait_until_idle(self, timeout=TIMEOUT):
        wait_until(lambda: self.status.running == self.status.waiting == 0, timeout)

    @contextmanager
    def held(self):
        """Within the block the model stands still after its first word, until the function given is called."""
        gate, passes = threading.Event(), count()
        self.backend.on_forward = lambda: next(passes) == 0 or gate.wait(TIMEOUT)
        try:
            yield gate.set
        finally:
            gate.set()


@contextmanager
def serving(reply=babble, *, template=TEMPLATE, context_length=256, model=None, **server):
    """`server` are keys of [server], `model` others of [[models]]. At the end the slot must be free, and whatever was opened is closed."""
    config = Config(
        ServerConfig(**server), models=(ModelSpec(MODEL, "none", aliases=(ALIAS,), load="on_demand", **(model or {})),)
    )
    loader = FakeLoader(reply, context_length=context_length, template=template)
    registry = ModelRegistry(config.models, lambda: loader)
    app = create_app(config, registry=registry)
    try:
        served = Served(app, Client(app), registry, loader)
        yield served
        served.wait_until_idle(timeout=1.0)
    finally:
        app.close()


@pytest.fixture
def serve():
    """`serving`, for the length of the test."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(serving(*args, **options))


@pytest.fixture
def served(serve):
    return serve()


def chat_body(content="Hello", **parameters):
    return {"model": MODEL, "messages": [{"role": "user", "content": content}]} | parameters


def wait_until(condition, timeout=TIMEOUT):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.005)
