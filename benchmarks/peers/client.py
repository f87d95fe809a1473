"""One thread that speaks for all clients: it shares the cores with what it measures.

A client is a script: a generator that yields requests, one after the other, and is sent what it saw of each answer.
"""

from __future__ import annotations

import heapq
import itertools
import selectors
import socket
import time
from collections.abc import Generator, Iterable
from typing import NamedTuple

from benchmarks.harness import Stream, read_stream

_RUNNING = 8
"""Pieces that have come of a stream that is surely being decoded; a head and an empty first content are among them."""

_PATIENCE = 600.0  # seconds


class Request(NamedTuple):
    """What is sent: not before `at` seconds of the run, nor before `beside` streams run, unless all end before.

    `role` tells requests of different kinds apart.
    """

    payload: bytes
    at: float = 0.0
    beside: int = 0
    role: str = ""


Script = Generator[Request, Stream | None, None]


class Answer(NamedTuple):
    """`sent`: seconds of the run when the request went out."""

    role: str
    sent: float
    stream: Stream


class Trace(NamedTuple):
    """A run: what came of its requests, and the seconds that this process computed for it."""

    answers: list[Answer]
    client_seconds: float


class _Exchange(NamedTuple):
    script: Script
    role: str
    sent: float
    arrivals: list[tuple[float, bytes]]


def drive(port: int, scripts: Iterable[Script]) -> Trace:
    """Run the scripts side by side. Raises RuntimeError for an answer that is no stream with status 200, OSError for none."""
    return _Run(port).drive(scripts)


class _Run:
    def __init__(self, port: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._due: list[tuple[float, int, Request, Script]] = []  # a heap, by time and then in order
        self._held: list[tuple[Request, Script]] = []  # until others run
        self._order = itertools.count()
        self._answers: list[Answer] = []
        self._begun = 0.0

    def drive(self, scripts: Iterable[Script]) -> Trace:
        self._begun, computed = time.perf_counter(), time.process_time()
        for script in scripts:
            self._advance(script, None)
        try:
            while self._due or self._held or self._selector.get_map():
                self._step()
        finally:
            for key in list(self._selector.get_map().values()):
                self._close(key)
            self._selector.close()
        return Trace(self._answers, time.process_time() - computed)

    def _step(self) -> None:
        """Send what is due, and take what comes until something else is."""
        self._release()
        while self._due and self._due[0][0] <= self._now():
            self._send(*heapq.heappop(self._due)[2:])
        ready = self._selector.select(max(0.0, self._due[0][0] - self._now()) if self._due else _PATIENCE)
        if not ready and not self._due:
            raise TimeoutError(f"nothing came for {_PATIENCE:g} s")
        for key, _ in ready:
            self._receive(key)

    def _now(self) -> float:
        return time.perf_counter() - self._begun

    def _advance(self, script: Script, stream: Stream | None) -> None:
        """Let the script say what it wants next."""
        try:
            request = script.send(stream)
        except StopIteration:
            return
        if request.beside:
            self._held.append((request, script))
        else:
            heapq.heappush(self._due, (request.at, next(self._order), request, script))

    def _release(self) -> None:
        """Make those due that wait for no more streams."""
        if not self._held:
            return
        exchanges = [key.data for key in self._selector.get_map().values()]
        num_running = sum(len(exchange.arrivals) >= _RUNNING for exchange in exchanges)
        for request, script in list(self._held):
            if num_running >= request.beside or not (exchanges or self._due):
                self._held.remove((request, script))
                heapq.heappush(self._due, (request.at, next(self._order), request, script))

    def _send(self, request: Request, script: Script) -> None:
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=_PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        exchange = _Exchange(script, request.role, self._now(), [])
        self._selector.register(connection, selectors.EVENT_READ, exchange)
        connection.sendall(request.payload)

    def _receive(self, key: selectors.SelectorKey) -> None:
        exchange = key.data
        if piece := key.fileobj.recv(65536):
            exchange.arrivals.append((self._now() - exchange.sent, piece))
            return
        self._close(key)
        stream = read_stream(exchange.arrivals)
        self._answers.append(Answer(exchange.role, exchange.sent, stream))
        self._advance(exchange.script, stream)

    def _close(self, key: selectors.SelectorKey) -> None:
        self._selector.unregister(key.fileobj)
        key.fileobj.close()
