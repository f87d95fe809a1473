"""Responses on the wire: JSON, server-sent events, errors. Knows HTTP; knows nothing of what is answered."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from llmserve.api import JSON
from llmserve.api.connection import ClientGone
from llmserve.api.context import Request
from llmserve.errors import APIError, InvalidAPIKey, MethodNotAllowed, ModelLoadFailed, Unavailable

HeaderList = list[tuple[str, str]]

log = logging.getLogger(__name__)

CLIENT_GONE = "client_gone"  # what the log calls an answer that nobody received
DONE = b"data: [DONE]\n\n"
# One line end, not two: an empty line would make official clients dispatch an event that has no data.
PING = b": ping\n"

_STREAM_HEADERS = [
    ("Content-Type", "text/event-stream; charset=utf-8"),
    ("Cache-Control", "no-cache"),
    ("X-Accel-Buffering", "no"),  # nginx would hold the stream back
]
_MAX_IGNORED_NAMES = 20
_LONGEST_MESSAGE = 800  # characters
_DEFAULT_RETRY_AFTER = 1.0  # seconds
_TO_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Response:
    """What a WSGI server is given: status, headers, body, and what is to be done when the last byte is out.

    Werkzeug's own would do, but it copies and checks every header twice, which costs more than to look up a cached answer.
    """

    __slots__ = ("_on_close", "body", "headers", "status")

    def __init__(self, body: Iterable[bytes], status: int = 200, headers: HeaderList | None = None) -> None:
        self.body = body
        self.status = status
        self.headers = headers or []
        self._on_close: list[Callable[[], None]] = []

    def call_on_close(self, callback: Callable[[], None]) -> None:
        self._on_close.append(callback)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.body)

    def close(self) -> None:
        """Called by the server on every path, whether the body was sent, broke off or was never begun."""
        if isinstance(self.body, Generator):
            self.body.close()
        for callback in self._on_close:
            callback()


def json_response(payload: JSON, status: int = 200, headers: HeaderList | None = None) -> Response:
    return encoded_response(encode(payload), status, headers)


def encoded_response(data: bytes, status: int = 200, headers: HeaderList | None = None) -> Response:
    """JSON that is bytes already."""
    own = [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
    return Response([data], status, own + (headers or []))


def error_response(error: APIError) -> Response:
    """Any outcome that is not an answer."""
    headers = []
    if isinstance(error, Unavailable):
        headers.append(("Retry-After", str(math.ceil(error.retry_after or _DEFAULT_RETRY_AFTER))))
    if isinstance(error, ModelLoadFailed):
        headers.append(("x-should-retry", "false"))
    if isinstance(error, MethodNotAllowed):
        headers.append(("Allow", ", ".join(error.allowed)))
    if isinstance(error, InvalidAPIKey):
        headers.append(("WWW-Authenticate", "Bearer"))
    return json_response(_envelope(error), error.status, headers)


def internal_error() -> APIError:
    """What a client is told of a bug: nothing. The log has it."""
    return APIError("The server had an error while processing your request. Sorry about that!")


def ignored_header(names: Sequence[str]) -> HeaderList:
    """Says which fields nothing knows: names that a client made up, in a form and number that fit a header."""
    if not names:
        return []
    shown = [re.sub(r"[^\w.\[\]-]", "?", name[:64], flags=re.ASCII) for name in names[:_MAX_IGNORED_NAMES]]
    return [("X-LLMServe-Ignored", ", ".join(shown + ["..."] * (len(names) > _MAX_IGNORED_NAMES)))]


def event_stream(request: Request, writes: Iterator[bytes], headers: HeaderList, ping_interval: float) -> Response:
    """A stream that sends each of `writes` as it comes. An empty one stands for silence: after `ping_interval` seconds
    of it a comment line is sent. What `writes` raises becomes the last event; the status is long gone.
    """
    return Response(_guard(request, writes, ping_interval), headers=_STREAM_HEADERS + headers)


def frame(payload: JSON) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(payload) + b"\n\n"


def encode(payload: JSON) -> bytes:
    """JSON in UTF-8, on one line whatever a client takes for a line end."""
    text = _TO_JSON(payload)
    for line_end, escape in (("\u2028", "\\u2028"), ("\u2029", "\\u2029"), ("\x85", "\\u0085")):
        text = text.replace(line_end, escape)
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair comes out as JSON's own escape


def _guard(request: Request, writes: Iterator[bytes], ping_interval: float) -> Iterator[bytes]:
    last_write = time.monotonic()
    try:
        for data in writes:
            silence = time.monotonic() - last_write
            if data or silence >= ping_interval:
                yield data or PING
                last_write = time.monotonic()
    except ClientGone:
        request.record.error = CLIENT_GONE
    except GeneratorExit:  # the server could not write on
        request.record.error = CLIENT_GONE
        raise
    except APIError as error:
        request.record.error = error.code
        yield frame(_envelope(error))
    except Exception:
        log.exception("%s broke while it was streamed", request.id)
        request.record.error = APIError.code
        yield frame(_envelope(internal_error()))


def _envelope(error: APIError) -> JSON:
    message = error.message
    if len(message) > _LONGEST_MESSAGE:  # it repeats what a client sent
        message = f"{message[:_LONGEST_MESSAGE]}..."
    return {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code}}
