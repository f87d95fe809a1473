"""The WSGI application: wires the objects once, dispatches requests, turns every error into an answer in one place."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from werkzeug.exceptions import MethodNotAllowed as WrongMethod
from werkzeug.exceptions import NotFound
from werkzeug.http import HTTP_STATUS_CODES

from llmserve import config as configuration
from llmserve.api.access import Access
from llmserve.api.connection import ClientGone
from llmserve.api.context import Context, Request
from llmserve.api.responses import CLIENT_GONE, Response, error_response, internal_error
from llmserve.api.urls import LONG, URLS, handler, preload
from llmserve.config import RESERVED_THREADS, Config
from llmserve.errors import APIError, MethodNotAllowed, QueueFull, UnknownURL
from llmserve.registry import ModelRegistry
from llmserve.response_cache import ResponseCache

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from llmserve.registry import ModelLoader

log = logging.getLogger(__name__)

_REMEMBERED_URLS = 256
_CLIENT_CLOSED_REQUEST = 499  # nobody receives it; the log tells it apart


def create_app(
    config: Config | str | Path | None = None, *, registry: ModelRegistry | None = None, owns_process: bool = False
) -> App:
    """The application of a configuration, or of the file at a path, or of the file that LLMSERVE_CONFIG names.

    Begins to load the startup models and returns at once. `owns_process`: nothing else in this process uses llama.cpp, so how that
    multiplies may be chosen for all of the process (engine/matmul.py). Raises ConfigError.
    """
    if not isinstance(config, Config):
        config = configuration.load(config)
    if registry is None:
        settled = config
        registry = ModelRegistry(settled.models, lambda: _make_loader(settled, owns_process), settled.server.memory_budget)
    app = App(Context(config, registry, ResponseCache(config.cache)))
    app.start()
    return app


def _make_loader(config: Config, owns_process: bool) -> ModelLoader:
    """Called in the first loading thread: what it imports would delay the first answer of /health."""
    from llmserve.engine import matmul
    from llmserve.models.loading import Loader

    preload()
    if owns_process:
        matmul.process.claim()
    return Loader(config.server)


class App:
    """A WSGI application. Thread-safe; one per process."""

    def __init__(self, context: Context) -> None:
        server = context.config.server
        self._context = context
        self._access = Access(server)
        self._urls = URLS.bind("")
        self._match = lru_cache(_REMEMBERED_URLS)(self._urls.match)
        self._gate = Gate(server.threads - RESERVED_THREADS)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ)
        response = self._respond(request)
        response.call_on_close(partial(_log, request, response.status))
        headers = response.headers + self._access.headers(request)
        headers += [("X-Request-Id", request.id), ("openai-processing-ms", str(round(_elapsed_ms(request))))]
        start_response(f"{response.status} {HTTP_STATUS_CODES.get(response.status, 'Unknown')}", headers)
        if request.method == "HEAD":
            response.body = []
        return response

    def listens_on(self, binds: Sequence[str]) -> None:
        """Told by a server that may have been given other addresses than the configuration's, before the first request."""
        self._access = Access(self._context.config.server, binds)

    def start(self) -> None:
        """Begin to load the startup models; returns at once."""
        self._context.registry.start()

    def close(self, grace: float = 0.0) -> None:
        """Refuse new work, let what is under way go on for `grace` seconds, end the rest, unload every model."""
        self._context.draining.set()
        self._context.registry.close(grace)

    def _respond(self, request: Request) -> Response:
        """The error boundary: an answer, whatever happens."""
        try:
            self._access.check(request)
            return self._dispatch(request)
        except APIError as error:
            request.record.error = error.code
            return error_response(error)
        except ClientGone:
            request.record.error = CLIENT_GONE
            return Response([], _CLIENT_CLOSED_REQUEST, [("Content-Length", "0")])
        except Exception:
            log.exception("%s %s %s broke", request.id, request.method, _printable(request.path))
            request.record.error = APIError.code
            return error_response(internal_error())

    def _dispatch(self, request: Request) -> Response:
        if request.method == "OPTIONS":
            return self._options(request)
        try:
            endpoint, arguments = self._match(request.path, request.method)
        except NotFound:
            raise _unknown_url(request) from None
        except WrongMethod:
            allowed = self._allowed(request)
            message = f"{request.method} is not allowed on {request.path}; allowed are {', '.join(allowed)}."
            raise MethodNotAllowed(message, allowed=allowed) from None
        answer = partial(handler(endpoint), self._context, request, **arguments)
        return self._pass_gate(answer) if endpoint in LONG else answer()

    def _pass_gate(self, answer: Callable[[], Response]) -> Response:
        """Answer what may take long, unless all threads for such are taken; it counts until its response is closed."""
        self._gate.enter()
        try:
            response = answer()
        except BaseException:
            self._gate.leave()
            raise
        response.call_on_close(self._gate.leave)
        return response

    def _options(self, request: Request) -> Response:
        """A browser's question before a request to an unknown URL is answered too: the request itself gets the 404."""
        allowed = self._allowed(request)
        if len(allowed) == 1 and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" not in request.environ:
            raise _unknown_url(request)
        return self._access.options(request, ", ".join(allowed))

    def _allowed(self, request: Request) -> tuple[str, ...]:
        return (*sorted(self._urls.allowed_methods(request.path)), "OPTIONS")


class Gate:
    """Counts the requests that may take long, so that they leave threads for the others. Thread-safe."""

    def __init__(self, room: int) -> None:
        self._lock = threading.Lock()
        self._room = room  # guarded by _lock

    def enter(self) -> None:
        """Raises QueueFull when as many are inside as may be: a full thread pool would be a queue that nobody sees."""
        with self._lock:
            if not self._room:
                raise QueueFull("All of this server's threads are busy. Please try again in a second.", retry_after=1.0)
            self._room -= 1

    def leave(self) -> None:
        with self._lock:
            self._room += 1


def _unknown_url(request: Request) -> UnknownURL:
    return UnknownURL(f"Unknown request URL: {request.method} {request.path}. GET / lists the URLs that this server has.")


def _log(request: Request, status: int) -> None:
    """The request's one line, when its last byte has been handed over."""
    log.info(
        "%s %s %s %d %.1f ms%s",
        request.id,
        request.method,
        _printable(request.path),
        status,
        _elapsed_ms(request),
        request.record,
    )


def _elapsed_ms(request: Request) -> float:
    return (time.monotonic() - request.received) * 1000


def _printable(path: str) -> str:
    """On one line, whatever was sent."""
    return path.encode("unicode_escape").decode()
