"""A client that goes away frees its slot within a second, wherever its request is."""

from __future__ import annotations

import json
import socket
import struct
import time

import pytest

from tests.e2e.conftest import MODEL

LONG = " ".join(f"word{number}" for number in range(330))  # a thousand tokens, which take seconds to prefill


def send(server, content, *, stream, max_tokens=1000):
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "stream": stream}
    payload = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(head.encode() + b"\r\n\r\n" + payload)
    return connection


def reset(connection):
    """Leave with a RST instead of a FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def load(server):
    _, status = server.get(f"/v1/models/{MODEL}")
    return status["running"], status["waiting"]


def wait_for(server, condition, timeout=10.0):
    deadline = time.monotonic() + timeout
    while not condition(*load(server)):
        assert time.monotonic() < deadline, load(server)
        time.sleep(0.02)


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
class TestLeaving:
    def test_in_decode(self, server, stream, leave):
        connection = send(server, "Write a very long story about a river.", stream=stream, max_tokens=1500)
        wait_for(server, lambda running, waiting: running == 1)
        time.sleep(0.7)  # beyond its short prefill
        leave(connection)
        server.wait_until_idle(MODEL, timeout=1.0)

    def test_in_prefill(self, server, stream, leave):
        connection = send(server, f"{time.time_ns()} {LONG}", stream=stream, max_tokens=100)
        wait_for(server, lambda running, waiting: running == 1)
        leave(connection)
        server.wait_until_idle(MODEL, timeout=1.0)

    def test_in_the_queue(self, server, stream, leave):
        busy = [
            send(server, f"Write a very long story about river number {n}.", stream=True, max_tokens=1500) for n in range(4)
        ]
        wait_for(server, lambda running, waiting: running == 4)
        queued = [send(server, f"Story {n}.", stream=stream) for n in range(3)]
        wait_for(server, lambda running, waiting: waiting == 3)
        for connection in queued:
            leave(connection)
        wait_for(server, lambda running, waiting: waiting == 0, timeout=1.0)
        for connection in busy:
            leave(connection)
        server.wait_until_idle(MODEL, timeout=1.0)


def test_others_go_on_when_the_first_client_of_a_shared_answer_leaves(server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Write a poem about sharing."}], "max_tokens": 60}
    payload = json.dumps(body | {"temperature": 0, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(payload)}"

    def ask():
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        connection.sendall(head.encode() + b"\r\n\r\n" + payload)
        return connection

    first = ask()
    assert b"X-Cache: miss" in first.recv(4096)
    second = ask()
    begin = second.recv(4096)
    assert b"X-Cache: coalesced" in begin
    first.close()
    rest = b"".join(iter(lambda: second.recv(65536), b""))
    assert b"data: [DONE]" in rest
    second.close()
