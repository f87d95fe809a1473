"""An engine behind a channel: what runs in a process of its own, at the other end of a `ProcessEngine`.

The main thread receives, and its beats tell that the interpreter runs; a thread loads the model, another one answers for the
library's tokenizer, one compiles grammars, and the engine has its own. The process ends with its socket.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from llmserve.engine.channel import (
    Acquire,
    Beat,
    Busy,
    Cancel,
    Channel,
    Cores,
    Embed,
    Logged,
    Open,
    Opened,
    Published,
    Recall,
    Refused,
    Return,
    Submit,
    Tokenize,
    Tokenized,
)
from llmserve.engine.compute import ComputeBudget, Ticket
from llmserve.engine.engine import Engine
from llmserve.engine.generation import Event, Failed, Generation, GenerationEnd
from llmserve.engine.tokenizer import LibraryTokenizer
from llmserve.errors import APIError, ModelFileError

log = logging.getLogger(__name__)

BEAT = 0.1
"""Seconds between two beats."""

_PR_SET_PDEATHSIG = 1  # prctl(2)

OpenEngine = Callable[[Open, ComputeBudget], Engine]


def live(channel: Channel, parent: int) -> None:
    """Make this process an engine's: it shares the server's end, whatever that is, and no signal that a terminal or a supervisor
    sends to all of them. `parent` is the server's process id.
    """
    if sys.platform == "linux":  # elsewhere the end of the socket has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    os.putenv("GGML_NO_BACKTRACE", "1")  # an abort would start a debugger, and bury its reason under what that says
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.excepthook = _die
    logging.getLogger().addHandler(_Forward(channel))


def _die(arguments: threading.ExceptHookArgs) -> None:
    """An engine that has lost a thread would leave somebody waiting: the server starts another."""
    sys.__excepthook__(arguments.exc_type, arguments.exc_value or arguments.exc_type(), arguments.exc_traceback)
    os._exit(1)


class EngineChild:
    """The life of an engine's process, from the first message to the end of the socket."""

    def __init__(self, channel: Channel, open_engine: OpenEngine) -> None:
        self._channel = channel
        self._open_engine = open_engine
        self._engine: Engine | None = None
        self._budget: LeasedBudget | None = None
        self._generations: dict[int, Generation] = {}
        self._texts: queue.SimpleQueue[Tokenize] = queue.SimpleQueue()
        self._constrained: queue.SimpleQueue[tuple[Submit, Generation]] = queue.SimpleQueue()

    def run(self) -> None:
        """Until the socket ends."""
        poll = select.poll()
        next_beat = 0.0
        while True:
            poll.register(self._channel, select.POLLIN | select.POLLOUT * self._channel.has_unsent)
            ready = poll.poll(BEAT * 1000)
            if any(event & ~select.POLLOUT for _, event in ready):
                try:
                    for message in self._channel.receive():
                        self._take(message)
                except EOFError:
                    return
            self._channel.flush()
            if time.monotonic() >= next_beat:
                self._channel.send(Beat())
                next_beat = time.monotonic() + BEAT

    def _take(self, message: object) -> None:
        match message:
            case Submit() | Embed():
                self._submit(message)
            case Cancel(number):
                if number in self._generations:
                    self._generations.pop(number).close()
            case Cores(threads):
                self._leased.grant(threads)
            case Recall():
                self._leased.recall()
            case Tokenize():
                self._texts.put(message)
            case Open():
                self._budget = LeasedBudget(message.cores, self._channel)
                logging.getLogger().setLevel(message.log_level)
                _start("llmserve-open", partial(self._open, message))

    @property
    def _leased(self) -> LeasedBudget:
        assert self._budget is not None
        return self._budget

    def _open(self, message: Open) -> None:
        """The loading thread's work. What a library dies of, or says only to stderr, the server sees for itself."""
        try:
            engine = self._open_engine(message, self._leased)
        except ModelFileError as error:
            self._channel.send(Refused(str(error)))
            return
        except Exception as error:
            log.exception("unexpected error while the model was loaded")
            self._channel.send(Refused(f"{type(error).__name__}: {error}"))
            return
        self._engine = engine
        _start("llmserve-compile", self._compile)
        tokenizer, vocabulary = engine.tokenizer, None
        if isinstance(tokenizer, LibraryTokenizer):
            _start("llmserve-tokenize", partial(self._tokenize, tokenizer))
            vocabulary = tokenizer.vocabulary
        self._channel.send(Opened(vocabulary, engine.vectors.dimensions if engine.vectors is not None else None))

    def _submit(self, message: Submit | Embed) -> None:
        generation = self._generations[message.number] = _Sent(partial(self._publish, message.number))
        if isinstance(message, Embed) or message.params.grammar is None:
            self._begin(message, generation)
        else:
            self._constrained.put((message, generation))

    def _begin(self, message: Submit | Embed, generation: Generation) -> None:
        assert self._engine is not None
        try:
            match message:
                case Submit(_, prompt_ids, params):
                    self._engine.submit(prompt_ids, params, generation)
                case Embed(_, texts):
                    self._engine.embed(texts, generation)
        except APIError as error:
            generation.publish(Failed(error))

    def _compile(self) -> None:
        """A thread's work: begin what is kept within a grammar. To compile one may take long, and the beats must go on."""
        while True:
            message, generation = self._constrained.get()
            if generation.closed:
                continue
            self._channel.send(Busy(active=True))
            self._begin(message, generation)
            self._channel.send(Busy(active=False))

    def _publish(self, number: int, event: Event) -> None:
        if isinstance(event, GenerationEnd | Failed):
            self._generations.pop(number, None)
        self._channel.send(Published(number, event))

    def _tokenize(self, tokenizer: LibraryTokenizer) -> None:
        while True:
            number, texts, place = self._texts.get()
            self._channel.send(Tokenized(number, tokenizer.tokenize(texts, place)))


class LeasedBudget(ComputeBudget):
    """Divides cores of the server's budget among the passes of this process, for as long as they are left to it."""

    def __init__(self, cores: int, channel: Channel) -> None:
        super().__init__(cores)
        self._channel = channel
        self._free = 0
        self._num_leased = 0  # guarded by _lock
        self._asked = False  # guarded by _lock
        self._recalled = False  # guarded by _lock

    def acquire(self, at_most: int) -> int:
        with self._lock:
            if self._has_room and not self._waiting and not self._recalled:
                return self._grant(at_most)
            ticket = Ticket(at_most)
            self._waiting.append(ticket)
            self._ask()
        return ticket.wait()

    def release(self, threads: int) -> None:
        with self._lock:
            self._free += threads
            self._num_leases -= 1
            if not self._recalled:
                self._serve()
            self._give_back()

    def grant(self, threads: int) -> None:
        """The server gives the process so many cores."""
        with self._lock:
            self._num_leased = self._free = threads
            self._asked = False
            self._serve()
            self._give_back()

    def recall(self) -> None:
        """The server wants them back, or those that it is about to give: it may have thought better of it meanwhile."""
        with self._lock:
            self._recalled = self._num_leased > 0 or self._asked
            self._give_back()

    def _ask(self) -> None:
        """Caller holds the lock."""
        if not self._num_leased and not self._asked:
            self._asked = True
            self._channel.send(Acquire())

    def _give_back(self) -> None:
        """If they are recalled and no pass has any. Caller holds the lock."""
        if self._recalled and self._num_leased and self._free == self._num_leased:
            self._channel.send(Return())
            self._num_leased = self._free = 0
            self._recalled = False
            if self._waiting:
                self._ask()


class _Sent(Generation):
    """A generation whose log is in the server."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        super().__init__()
        self._send = send

    def publish(self, event: Event) -> None:
        self._send(event)


class _Forward(logging.Handler):
    """The root logger's only handler: the server has the log."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(Logged(record.name, record.levelno, self.format(record)))


def _start(name: str, target: Callable[[], None]) -> None:
    threading.Thread(target=target, name=name, daemon=True).start()
