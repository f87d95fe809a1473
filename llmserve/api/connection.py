"""Whether anybody still waits for an answer: looks at the client's socket without reading from it.

A thread that waits for a model writes nothing, so no failing write tells it that its client left.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmserve.errors import DeadlineExceeded

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

LOOK_INTERVAL = 0.25
"""Seconds between two looks; a thread that waits for something wakes up at least this often."""

# POLLRDHUP, where there is one, tells a close apart from data that a pipelining client sent ahead; POLLHUP is always told.
_GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR | select.POLLNVAL


class ClientGone(Exception):
    """The client closed its connection, or its sending half: nobody reads the answer. No response comes of it."""


class Watch:
    """Called now and then by a thread that waits for an answer: raises when there is no use in waiting on.

    Raises ClientGone, or DeadlineExceeded at `deadline` (seconds of `clock`). Cheap to call: the socket is looked at
    every LOOK_INTERVAL at most.
    """

    def __init__(self, environ: WSGIEnvironment, deadline: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._left = _observer(environ)
        self._deadline = deadline
        self._clock = clock
        self._next_look = clock() + LOOK_INTERVAL

    def __call__(self) -> None:
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + LOOK_INTERVAL
            if self._left():
                raise ClientGone
        if now >= self._deadline:
            raise DeadlineExceeded("The answer took longer than this server allows one request.")


def _observer(environ: WSGIEnvironment) -> Callable[[], bool]:
    """What tells that this request's client left, as the WSGI server offers it. Where it offers nothing, none ever leaves."""
    disconnected: Callable[[], bool] | None = environ.get("waitress.client_disconnected")
    if disconnected is not None:
        return disconnected
    sock = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    if sock is None:
        return lambda: False
    poll = select.poll()
    poll.register(sock, _GONE)
    return lambda: bool(poll.poll(0))
