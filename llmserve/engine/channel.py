"""Messages between a server and the processes of its engines, and the socket they travel on.

Pickled and framed by their length. Both ends are one program of one user and the socket has no name, so they trust each other.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from typing import Any, NamedTuple

from llmserve.engine.generation import Event, GenerationParams
from llmserve.engine.tokenizer import Place
from llmserve.engine.vocabulary import Vocabulary

_LENGTH = struct.Struct("!I")
_READ_SIZE = 256 * 1024  # bytes


class Open(NamedTuple):
    """To the process: what to open. `model` knows how; passes of all processes together have `cores`."""

    model: Any
    cores: int
    log_level: int


class Opened(NamedTuple):
    """From the process. `vocabulary` is for a server that has `Tokenize` answered, `dimensions` of a model that makes vectors; else None."""

    vocabulary: Vocabulary | None
    dimensions: int | None = None


class Refused(NamedTuple):
    """From the process: the model cannot be opened. The last message."""

    reason: str


class Submit(NamedTuple):
    number: int
    prompt_ids: list[int]
    params: GenerationParams


class Embed(NamedTuple):
    number: int
    texts: list[list[int]]


class Cancel(NamedTuple):
    """To the process: nobody reads generation `number` any more. No event of it is awaited either."""

    number: int


class Published(NamedTuple):
    """From the process: an event of a generation, as soon as there is one: the server renders it while the next token is sampled."""

    number: int
    event: Event


class Tokenize(NamedTuple):
    """To the process: texts for the library's own tokenizer, all those of a prompt at once."""

    number: int
    texts: list[bytes]
    place: Place


class Tokenized(NamedTuple):
    number: int
    encoded: list[list[int]]


class Acquire(NamedTuple):
    """From the process: it has a pass to make and no cores."""


class Cores(NamedTuple):
    """To the process: cores that it has until it gives them back."""

    threads: int


class Recall(NamedTuple):
    """To the process: it is to give its cores back after the passes that it makes now."""


class Return(NamedTuple):
    """From the process: it has no cores any more."""


class Beat(NamedTuple):
    """From the process, several times a second: its interpreter runs."""


class Busy(NamedTuple):
    """From the process: from now on, until it is told otherwise, a library may hold the GIL for longer than a beat."""

    active: bool


class Logged(NamedTuple):
    """From the process: a line for the server's log."""

    name: str
    level: int
    text: str


class Channel:
    """One end of the socket. Any thread may send; one thread receives.

    Nobody waits for the other end: what the socket does not take at once is kept, and sent by `flush`.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._lock = threading.Lock()
        self._unsent = bytearray()  # guarded by _lock
        self._received = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def send(self, message: Any) -> None:
        """Does nothing once the other end is gone: `receive` tells that."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._unsent += _LENGTH.pack(len(data)) + data
            self._flush()

    def flush(self) -> None:
        """Send what is left, as far as the socket takes it; it is writable again then."""
        with self._lock:
            self._flush()

    def receive(self) -> list[Any]:
        """The messages that have come. EOFError when the other end is gone, and everything it sent has been received."""
        try:
            data = self._socket.recv(_READ_SIZE)
        except BlockingIOError:
            return []
        except ConnectionError:
            raise EOFError from None
        if not data:
            raise EOFError
        self._received += data
        return list(iter(self._take, None))

    def close(self) -> None:
        with self._lock:
            self._unsent.clear()
            self._socket.close()

    def _flush(self) -> None:
        """Caller holds the lock."""
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # the other end is gone, or this one is closed
            self._unsent.clear()

    def _take(self) -> Any | None:
        """The next message that is whole."""
        if len(self._received) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
        if len(self._received) < end:
            return None
        message = pickle.loads(memoryview(self._received)[_LENGTH.size : end])
        del self._received[:end]
        return message
