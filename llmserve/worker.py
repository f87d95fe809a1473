"""gunicorn's threaded worker, made to wait for no client.

gthread gives a thread to every connection, also to those that say nothing, and its one accepting thread waits up to two seconds
for each client that does not close. Here a thread is given to requests that have come, and all other waiting is the poller's.
"""

from __future__ import annotations

import re
import selectors
import socket
import struct
import time
from contextlib import suppress
from functools import partial
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

_MOST_BYTES = 64 * 1024
"""Of a request that wait in the kernel for the rest; the rest of a larger one is waited for by its thread."""

_SILENCE = 15
"""Seconds that a thread waits for the next byte of a request."""

_PATIENCE = 60.0
"""Seconds that a client has for its first request, from when it connects, as far as the kernel keeps the request."""

_LINGER = 2.0
"""Seconds that a client has to close after us: what it sends later would reset the connection, and with it our last bytes (RFC 9112, 9.6)."""

_FIELDS = re.compile(rb"\r\n(?:(expect):|content-length:[ \t]*([0-9]{1,9}))", re.IGNORECASE)
_NO_HTTP = re.compile(rb"[^A-Za-z\r\n]|.*?\n\r?\n", re.DOTALL)
"""What begins as no request line does, as TLS, or ends its head with bare line feeds: a thread is to say so at once."""


class Worker(ThreadWorker):  # type: ignore[misc]
    """`pending_conns` are those whose request has not come, and those that are closing. The accepting thread's own."""

    def enqueue_req(self, conn: Any) -> None:
        """Give it a thread, if its first request is here. Later ones are not looked at: it would cost a tenth of the cached answers."""
        if conn.initialized or self.cfg.is_ssl:  # what is enciphered cannot be looked at
            super().enqueue_req(conn)
        elif _has_come(conn.sock):
            conn.data_ready = True
            super().enqueue_req(conn)
        else:
            self._wait(conn, self.on_pending_socket_readable)
            if conn.timeout is None:  # not anew with each byte
                conn.timeout = time.monotonic() + (_PATIENCE if self.alive else _LINGER)

    def handle(self, conn: Any) -> Any:
        """A thread's work: answer a request. False: it was the last of this connection."""
        if not conn.initialized:
            _limit_silence(conn.sock)
        result = super().handle(conn)
        conn.closing = result is False and _end_sending(conn.sock)
        return result

    def finish_request(self, conn: Any, fs: Any) -> None:
        """What comes after it."""
        if getattr(conn, "closing", False):
            self._wait(conn, self._drain)
            conn.timeout = time.monotonic() + _LINGER
        else:
            super().finish_request(conn, fs)

    def murder_pending(self) -> None:
        """Close those that have waited long enough; their times differ, so it looks at all."""
        now = time.monotonic()
        for conn in [conn for conn in self.pending_conns if conn.timeout <= now]:
            self._close(conn)

    def _cap_keepalive(self, deadline: float) -> None:
        """The worker stops: nobody waits longer than until then."""
        super()._cap_keepalive(deadline)
        for conn in self.pending_conns:
            conn.timeout = min(conn.timeout, deadline)

    def _wait(self, conn: Any, on_readable: Any) -> None:
        conn.sock.setblocking(False)
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(on_readable, conn))

    def _drain(self, conn: Any, sock: Any) -> None:
        """Throw away what still comes, until the client closes as well."""
        try:
            over = not sock.recv(_MOST_BYTES)
        except BlockingIOError:
            over = False
        except OSError:
            over = True
        if over:
            self._close(conn)

    def _close(self, conn: Any) -> None:
        self.pending_conns.remove(conn)
        self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()


def _has_come(sock: Any) -> bool:
    """Whether there is something for a thread to do: a request, as far as the kernel keeps it, or the end of the connection.

    If not, the socket becomes readable (SO_RCVLOWAT, socket(7)) when there may be.
    """
    try:
        awaited = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)
        data = sock.recv(_MOST_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        wanted = min(_length(data), _MOST_BYTES)
        come = len(data) >= wanted or len(data) < awaited  # readable although less than that is there: no more will come
        if (1 if come else wanted) != awaited:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1 if come else wanted)
        return come
    except BlockingIOError:
        return False
    except OSError:
        return True


def _length(data: bytes) -> int:
    """Bytes of the request that begins with `data`, up to where it cannot be told before a thread has read it; more than there are
    while that is unknown."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return len(data) + (bool(data) and not _NO_HTTP.match(data))
    fields = _FIELDS.findall(data, 0, end)
    expects = any(expect for expect, _ in fields)  # to be told to go on before it sends the rest
    return end + 4 + (0 if expects else sum(int(length) for _, length in fields))


def _limit_silence(sock: Any) -> None:
    """Of what a thread waits for (socket(7)); Python's own timeouts are gunicorn's, which sets none."""
    with suppress(OSError):  # the connection has ended
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _SILENCE, 0))


def _end_sending(sock: Any) -> bool:
    """Whether the client may still have something to say to that."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return False
    return True
