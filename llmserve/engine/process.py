"""A child process with a channel, and the one thread of the server that has it for all its life.

The thread spawns it, hands on what it sends, puts what it writes into the log, notices when it dies or hangs, and reaps it.
Knows nothing of generations.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol

from llmserve.engine.channel import Beat, Busy, Channel, Logged, Open, Opened, Refused, Tokenize, Tokenized
from llmserve.engine.tokenizer import Place
from llmserve.engine.vigil import LONG_SILENCE, SILENCE, Vigil
from llmserve.errors import EngineDied, ModelFileError

log = logging.getLogger(__name__)

_TURN = 0.1
"""Seconds between two looks at the process."""

_OPEN_TIMEOUT = 300.0  # seconds; a large file comes from a slow disk
_NUM_LAST_WORDS = 20  # lines
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)


class Owner(Protocol):
    """Who is told of a process, by its thread."""

    def receive(self, message: Any) -> None: ...

    def turn(self) -> None:
        """After each batch of messages, and several times a second."""

    def died(self, error: EngineDied) -> None:
        """It is gone, and nobody closed it. Nothing follows."""


class ProcessEnded(Exception):
    """A process ended before its model was open; why. `crashed`: in native code."""

    def __init__(self, reason: str, *, crashed: bool) -> None:
        super().__init__(reason)
        self.crashed = crashed


class EngineProcess:
    """Thread-safe. The process lives until `close`, if it does not die."""

    def __init__(self, name: str, arguments: Sequence[str], message: Open) -> None:
        """Start `python ARGUMENTS… DESCRIPTOR PID`, where the channel is and whose child it is, with a first message; returns at once."""
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        self._channel.send(message)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None  # guarded by _lock
        self._closing = False  # guarded by _lock
        self._death: EngineDied | None = None  # guarded by _lock
        self._owner: Owner | None = None  # guarded by _lock
        self._calls: dict[int, queue.SimpleQueue[list[list[int]] | None]] = {}  # guarded by _lock
        self._numbers = count()
        self._outcome: queue.SimpleQueue[Opened | ModelFileError | ProcessEnded] = queue.SimpleQueue()
        self._vigil = Vigil()
        self._output = _Output(name)
        command = [sys.executable, "-u", *arguments, str(theirs.fileno()), str(os.getpid())]
        self._thread = threading.Thread(target=self._live, args=(command, theirs), name=f"llmserve-engine-{name}", daemon=True)
        self._thread.start()

    def opened(self) -> Opened:
        """Wait until the model is open; what the process says of it. Raises ModelFileError when it refuses, and ProcessEnded."""
        try:
            outcome = self._outcome.get(timeout=_OPEN_TIMEOUT)
        except queue.Empty:
            raise ProcessEnded(f"it took longer than {_OPEN_TIMEOUT:g} s", crashed=False) from None
        if not isinstance(outcome, Opened):
            raise outcome
        return outcome

    def attach(self, owner: Owner) -> None:
        """Say from now on who is told what happens."""
        with self._lock:
            self._owner = owner
            death = self._death
        if death is not None:
            owner.died(death)

    def send(self, message: Any) -> None:
        """Never waits. Does nothing once the process is gone."""
        self._channel.send(message)

    def tokenize(self, texts: Sequence[bytes], place: Place) -> list[list[int]]:
        """Have the library of the process do it. Raises EngineDied."""
        answer: queue.SimpleQueue[list[list[int]] | None] = queue.SimpleQueue()
        number = next(self._numbers)
        with self._lock:
            if self._death is not None:
                raise _copy(self._death)
            self._calls[number] = answer
        self.send(Tokenize(number, list(texts), place))
        encoded = answer.get()
        if encoded is None:
            assert self._death is not None
            raise _copy(self._death)
        return encoded

    def close(self) -> None:
        """Kill it, and return when it is gone with all its memory. Idempotent."""
        with self._lock:
            self._closing = True
            if self._process is not None:
                self._process.kill()
        if self._thread is not threading.current_thread():
            self._thread.join()

    # What the thread does.

    def _live(self, command: list[str], theirs: socket.socket) -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                process_group=0,  # what a terminal sends is the server's; a session of its own would be weighed against it by autogroups
            )
        except OSError as error:
            self._end(f"no process could be started ({error.strerror})", crashed=False)
            return
        finally:
            theirs.close()
        with self._lock:
            self._process = process
            if self._closing:
                process.kill()
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        with process.stdout as output:
            try:
                hang = self._watch(process, output.fileno())
            except Exception:  # whatever it sent: nobody may be left waiting
                log.exception("what the process of %s sent could not be handled", self._thread.name)
                hang = "the server could not follow it"
            process.kill()
            status = process.wait()
            self._output.read(output.fileno())
        self._end(hang or self._output.explain(status), crashed=-status in _CRASHES)

    def _watch(self, process: subprocess.Popen[bytes], output: int) -> str:
        """Until the end of the socket, or until it hangs: how, "" if it does not."""
        poll = select.poll()
        poll.register(output, select.POLLIN)
        next_look = time.monotonic() + _TURN
        while True:
            poll.register(self._channel, select.POLLIN | select.POLLOUT * self._channel.has_unsent)
            ready = {descriptor for descriptor, _ in poll.poll(_TURN * 1000)}
            if output in ready and not self._output.read(output):
                poll.unregister(output)
            if self._channel.fileno() in ready:
                self._channel.flush()
                try:
                    messages = self._channel.receive()
                except EOFError:
                    return ""
                for message in messages:
                    self._take(message)
            if self._owner is not None:
                self._owner.turn()
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _TURN
                if hang := self._vigil.look(process.pid):
                    return hang

    def _take(self, message: Any) -> None:
        self._vigil.note_life()
        match message:
            case Beat():
                pass
            case Logged(name, level, text):
                logging.getLogger(name).log(level, "%s", text)
            case Tokenized(number, encoded):
                with self._lock:
                    answer = self._calls.pop(number)
                answer.put(encoded)
            case Busy(active):
                self._vigil.expect(LONG_SILENCE if active else SILENCE)
            case Opened():
                self._vigil.expect(SILENCE)
                self._outcome.put(message)
            case Refused(reason):
                self._outcome.put(ModelFileError(reason))
            case _:
                assert self._owner is not None
                self._owner.receive(message)

    def _end(self, reason: str, *, crashed: bool) -> None:
        death = EngineDied(f"The model's engine ended: {reason}.", retry_after=1.0)
        with self._lock:
            self._death = death
            owner = None if self._closing else self._owner
            calls = list(self._calls.values())
            self._calls.clear()
        self._channel.close()
        for answer in calls:
            answer.put(None)
        self._outcome.put(ProcessEnded(reason, crashed=crashed))
        if owner is not None:
            log.error("%s: %s", self._thread.name, reason)
            owner.died(death)


class _Output:
    """What the process writes to its standard output and error: native libraries have no other way to say what they die of."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(f"llmserve.engine.{name}")
        self._rest = b""
        self._lines: deque[str] = deque(maxlen=_NUM_LAST_WORDS)

    def read(self, descriptor: int) -> bool:
        """Log what has come; False at its end."""
        try:
            while data := os.read(descriptor, 65536):
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    self._take(line)
        except BlockingIOError:
            return True
        self._take(self._rest)
        self._rest = b""
        return False

    def explain(self, status: int) -> str:
        """How the process ended, and its last words."""
        said = self._lines[-1].rstrip(".") if self._lines else ""
        if status < 0:
            how = "the library crashed with" if -status in _CRASHES else "its process was killed with"
            death = f"{how} {signal.Signals(-status).name}"
            return f"{death} ({said})" if said else death
        return said or "the library refuses it"

    def _take(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            self._lines.append(text)
            self._log.warning("%s", text)


def _copy(error: EngineDied) -> EngineDied:
    """For raising adds a traceback."""
    return EngineDied(error.message, retry_after=error.retry_after)
