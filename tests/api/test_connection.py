import socket
import threading

import pytest

from llmserve.api.connection import LOOK_INTERVAL, ClientGone, Watch
from llmserve.errors import DeadlineExceeded


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pair():
    server, client = socket.socketpair()
    with server, client:
        yield server, client


@pytest.fixture
def connection():
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with server, client:
        yield server, client


def look(watch, clock):
    clock.now += LOOK_INTERVAL
    watch()


@pytest.mark.parametrize("name", ["gunicorn.socket", "werkzeug.socket"])
def test_a_client_that_closed_is_noticed(connection, clock, name):
    server, client = connection
    watch = Watch({name: server}, deadline=9, clock=clock)
    look(watch, clock)
    client.close()
    with pytest.raises(ClientGone):
        look(watch, clock)


def test_a_client_that_will_send_no_more_counts_as_gone(connection, clock):
    server, client = connection
    watch = Watch({"gunicorn.socket": server}, deadline=9, clock=clock)
    client.shutdown(socket.SHUT_WR)
    with pytest.raises(ClientGone):
        look(watch, clock)


def test_a_client_that_sent_its_next_request_is_there_until_it_closes(connection, clock):
    server, client = connection
    watch = Watch({"gunicorn.socket": server}, deadline=9, clock=clock)
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    look(watch, clock)
    client.close()
    with pytest.raises(ClientGone):
        look(watch, clock)
    assert server.recv(3) == b"GET"


def test_a_socket_with_a_timeout_does_not_make_the_look_wait(pair, clock):
    server, _ = pair
    server.settimeout(30)
    watch = Watch({"gunicorn.socket": server}, deadline=9, clock=clock)
    clock.now = LOOK_INTERVAL
    looking = threading.Thread(target=watch)
    looking.start()
    looking.join(5)
    assert not looking.is_alive()


def test_a_server_that_knows_it_itself_is_asked(clock):
    gone = []
    watch = Watch({"waitress.client_disconnected": lambda: bool(gone)}, deadline=9, clock=clock)
    look(watch, clock)
    gone.append(1)
    with pytest.raises(ClientGone):
        look(watch, clock)


def test_the_socket_is_looked_at_now_and_then_only(clock):
    looks = []
    watch = Watch({"waitress.client_disconnected": lambda: looks.append(clock.now)}, deadline=9, clock=clock)
    for _ in range(16):
        clock.now += LOOK_INTERVAL / 8
        watch()
    assert looks == [LOOK_INTERVAL, 2 * LOOK_INTERVAL]


def test_without_a_socket_nobody_ever_leaves_but_the_deadline_holds(clock):
    watch = Watch({}, deadline=2, clock=clock)
    clock.now = 1.9
    watch()
    clock.now = 2
    with pytest.raises(DeadlineExceeded):
        watch()
