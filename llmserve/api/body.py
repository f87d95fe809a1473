"""A request's body, bytes and JSON. Knows HTTP's ways of sending one; knows no endpoint."""

from __future__ import annotations

from typing import IO

from werkzeug.wsgi import get_content_length

from llmserve.api import JSON
from llmserve.api.context import Request
from llmserve.api.schema import parse_json
from llmserve.errors import BodyTooLarge, InvalidRequest, UnsupportedContentType


def read(request: Request, max_size: int) -> bytes:
    """The whole body, meant to be JSON. Raises BodyTooLarge, UnsupportedContentType, and InvalidRequest when it is cut short."""
    _check_headers(request)
    environ = request.environ
    length = get_content_length(environ)
    _check_size(length or 0, max_size)
    # Without a length it comes in chunks, if the server knows the last one: else to read on would be to wait for ever.
    in_chunks = length is None and environ.get("wsgi.input_terminated")
    data = _read_up_to(max_size + 1 if in_chunks else length or 0, environ["wsgi.input"])
    _check_size(len(data), max_size)
    if len(data) < (length or 0):
        raise _malformed("it ended early")
    return data


def parse_object(data: bytes) -> dict[str, JSON]:
    """The JSON object in a body. Raises InvalidRequest."""
    try:
        value = parse_json(data.decode())
    except ValueError as error:
        raise _malformed(str(error)) from None
    if not isinstance(value, dict):
        raise _malformed("it is not an object")
    return value


def _check_headers(request: Request) -> None:
    """A body without a type is taken for JSON: nothing else is ever sent here, and simple clients name none."""
    if request.environ.get("CONTENT_TYPE") != "application/json" and request.mimetype not in ("application/json", ""):
        raise UnsupportedContentType(
            f"Unsupported content type: '{request.mimetype}'. This API method only accepts 'application/json' requests, "
            "so send the header Content-Type: application/json."
        )
    encoding = request.environ.get("HTTP_CONTENT_ENCODING", "identity")
    if encoding.strip().lower() not in ("identity", ""):
        raise UnsupportedContentType(f"Unsupported content encoding: '{encoding}'. Send the body uncompressed.")


def _check_size(size: int, max_size: int) -> None:
    if size > max_size:
        raise BodyTooLarge(f"The request body is larger than the {max_size} bytes that this server accepts.")


def _read_up_to(size: int, stream: IO[bytes]) -> bytes:
    try:
        data = stream.read(size)
        while len(data) < size and (more := stream.read(size - len(data))):
            data += more
        return data
    except Exception as error:  # a client that left, a malformed chunk: every server has exceptions of its own for these
        raise _malformed(f"it broke off, {error}") from error


def _malformed(reason: str) -> InvalidRequest:
    return InvalidRequest(
        "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
        f"correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON: {reason}.)"
    )
