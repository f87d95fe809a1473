"""Clients of the fault suite: plain sockets, which see whatever the server does."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from contextlib import contextmanager

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nCache-Control: no-store\r\n"
LONG = " ".join(f"word{number}" for number in range(330))  # a thousand tokens, which take seconds to prefill


def wait_for(condition, timeout=30.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def payload(model, content="Write a very long story.", **options):
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"{content} {time.time_ns()}"}],
        "max_tokens": 8,
        **options,
    }
    return json.dumps(body).encode()


def send(port, model, content="Write a very long story.", **options):
    connection = connect(port)
    ask_on(connection, model, content, **options)
    return connection


def ask_on(connection, model, content="Write a very long story.", **options):
    data = payload(model, content, **options)
    connection.sendall(f"{HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def read_all(connection):
    """What came, up to the end however it came."""
    received = b""
    try:
        with connection:
            while piece := connection.recv(65536):
                received += piece
    except OSError:
        received += b"<reset>"
    return received


def outcome(raw):
    """What a client would say of an answer."""
    if not raw or raw == b"<reset>":
        return "closed"
    status = raw[9:12].decode(errors="replace")
    code = raw.split(b'"code":"')[1].split(b'"')[0].decode() if b'"code":"' in raw else ""
    if status == "200" and code:
        return f"200, then an error event ({code})"
    if status == "200":
        return "200"
    return f"{status} {code}"


def ask(port, model, content="Hello.", **options):
    return outcome(read_all(send(port, model, content, **options)))


def reset(connection):
    """Leave with a RST instead of a FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextmanager
def slow_client(port, model, **options):
    """A request whose answer is read at a byte a second, over a connection that keeps as little as may be."""
    over = threading.Event()
    with socket.socket() as connection:
        connection.settimeout(60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        ask_on(connection, model, **options)

        def read():
            while not over.wait(1.0):
                connection.recv(1)

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class Client(threading.Thread):
    """One request, and what came of it."""

    def __init__(self, port, model, content="Write a very long story.", **options):
        super().__init__()
        self.connection = send(port, model, content, **options)
        self.flowing = threading.Event()
        self.received = b""
        self.start()

    def run(self):
        try:
            while piece := self.connection.recv(65536):
                self.received += piece
                if self.received.count(b'"content"') > 4:
                    self.flowing.set()
        except OSError:
            self.received += b"<reset>"
        self.connection.close()

    def outcome(self):
        self.join(180)
        assert not self.is_alive(), "no end of the answer"
        return outcome(self.received)


class Bystander(threading.Thread):
    """One long stream after the other on a model that nothing happens to; when each piece of them came."""

    def __init__(self, port, model):
        super().__init__()
        self.port, self.model = port, model
        self.times, self.outcomes = [], []
        self.flowing, self.over = threading.Event(), threading.Event()

    def run(self):
        while not self.over.is_set():
            raw = b""
            with send(self.port, self.model, stream=True, max_tokens=1500) as connection:
                while not self.over.is_set() and (piece := connection.recv(65536)):
                    raw += piece
                    self.times.append(time.monotonic())
                    if len(self.times) > 10:
                        self.flowing.set()
            self.outcomes.append(outcome(raw))

    def finish(self):
        time.sleep(0.2)
        self.over.set()
        self.join(60)

    @property
    def longest_gap(self):
        return max(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))
