"""gunicorn's threaded worker: what of a request must be there before a thread is given to it."""

import socket
from contextlib import closing

import pytest

from llmserve.worker import _has_come, _length

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    ("data", "come"),
    [
        (b"", False),
        (b"P", False),
        (HEAD, False),
        (HEAD + b"\r\n", True),
        (HEAD + b"Content-Length: 3\r\n\r\n{}", False),
        (HEAD + b"Content-Length: 2\r\n\r\n{}", True),
        (HEAD + b"content-length:2\r\n\r\n{}GET ", True),
        (HEAD + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n", True),
        (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", False),
        (b"\x16\x03\x01\x00\xc8", True),
        (b"GET / HTTP/1.0\n\n", True),
    ],
    ids=[
        "nothing", "a byte", "half a head", "a head", "half a body", "a whole", "more", "waits to be told", "digits", "TLS", "line feeds",
    ],
)  # fmt: skip
def test_a_thread_is_given_to_what_it_can_answer(data, come):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with closing(accepted):
            client.sendall(data)
            if data:
                accepted.recv(1, socket.MSG_PEEK)
            assert _has_come(accepted) == come


def test_a_length_that_no_memory_holds_is_a_number_all_the_same():
    assert _length(HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n") < 10**10
