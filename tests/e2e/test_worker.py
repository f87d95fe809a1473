"""Two threads, and many clients that take their time: whoever has asked is answered at once."""

from __future__ import annotations

import signal
import socket
import time
from contextlib import ExitStack, closing

import pytest

from benchmarks import harness

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
SHORT = HEAD + b"Content-Length: 5\r\n\r\nhello"
LARGE = HEAD + b"Content-Length: 300000\r\n\r\n" + b"x" * 300_000
AT_ONCE = 1.0  # seconds; a thread that is waited for takes two of them, or more


@pytest.fixture(scope="module")
def port():
    with harness.gunicorn("-k", "llmserve.worker.Worker", "--threads", "2", "tests.e2e.echo:app") as server:
        server.wait("/")
        yield server.port


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def ask(connection, data=SHORT):
    """Send the last bytes of a request; what the answer says."""
    connection.sendall(data)
    received = b""
    while not received.partition(b"\r\n\r\n")[2]:
        received += connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 200")
    return received.partition(b"\r\n\r\n")[2].decode()


@pytest.mark.parametrize("sent", [b"", HEAD[:20], SHORT[:-1]], ids=["nothing", "half a head", "half a body"])
def test_clients_that_have_not_asked_yet_keep_nobody_waiting(port, sent):
    with ExitStack() as opened:
        others = [opened.enter_context(connect(port)) for _ in range(100)]
        for other in others:
            other.sendall(sent)
        begun = time.monotonic()
        with connect(port) as connection:
            assert ask(connection) == "5"
        assert time.monotonic() - begun < AT_ONCE
        assert ask(others[50], SHORT[len(sent) :]) == "5"


def test_clients_that_do_not_close_keep_nobody_waiting(port):
    with ExitStack() as opened:
        for _ in range(10):
            ask(opened.enter_context(connect(port)), SHORT.replace(b"localhost", b"localhost\r\nConnection: close"))
        begun = time.monotonic()
        with connect(port) as connection:
            assert ask(connection) == "5"
        assert time.monotonic() - begun < AT_ONCE


def test_a_client_that_is_told_to_close_and_does_not_is_closed(port):
    with connect(port) as connection:
        ask(connection, SHORT.replace(b"localhost", b"localhost\r\nConnection: close"))
        assert connection.recv(1) == b""  # the server's half
        with pytest.raises(ConnectionError):  # and then the other one
            for _ in range(100):
                time.sleep(0.1)
                connection.sendall(b"x")


@pytest.mark.parametrize("piece", [1, 7, 4096], ids=lambda piece: f"{piece} bytes at a time")
def test_a_request_may_come_in_pieces(port, piece):
    with connect(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = LARGE if piece > 1000 else SHORT
        rest = (len(data) - 1) // piece * piece
        for start in range(0, rest, piece):
            connection.sendall(data[start : start + piece])
        body = data.partition(b"\r\n\r\n")[2]
        assert ask(connection, data[rest:]) == str(len(body))


def test_requests_on_one_connection_are_answered_in_turn(port):
    with connect(port) as connection:
        assert [ask(connection, data) for data in (SHORT, LARGE, SHORT)] == ["5", "300000", "5"]
        connection.sendall(SHORT + SHORT)
        received = b""
        while received.count(b"5") < 2:
            received += connection.recv(65536)


def test_a_client_that_waits_to_be_told_to_go_on_is(port):
    with connect(port) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 100")
        assert ask(connection, b"hello") == "5"


def test_a_client_that_sends_no_more_has_the_rest_of_its_connection_looked_at(port):
    with connect(port) as connection:
        connection.sendall(SHORT)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    with connect(port) as connection:
        connection.sendall(HEAD[:20])
        connection.shutdown(socket.SHUT_WR)
        begun = time.monotonic()
        assert not connection.recv(65536).startswith(b"HTTP/1.1 2")
        assert time.monotonic() - begun < AT_ONCE


def test_the_worker_ends_although_clients_are_connected():
    with (
        harness.gunicorn("-k", "llmserve.worker.Worker", "--threads", "2", "tests.e2e.echo:app") as server,
        ExitStack() as opened,
    ):
        server.wait("/")
        for sent in (b"", HEAD[:20], SHORT):
            opened.enter_context(closing(connect(server.port))).sendall(sent)
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert server.process.wait(20) == 0
        assert time.monotonic() - begun < 5
