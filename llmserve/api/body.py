"""A request's body, bytes and JSON. Knows HTTP's ways of sending one; knows no endpoint."""

from __future__ import annotations

from werkzeug.exceptions import RequestEntityTooLarge

from llmserve.api.context import Request
from llmserve.api.fields import JSON
from llmserve.api.schema import parse_json
from llmserve.errors import BodyTooLarge, InvalidRequest, UnsupportedContentType


def read(request: Request, max_size: int) -> bytes:
    """The whole body, meant to be JSON. Raises BodyTooLarge, UnsupportedContentType, and InvalidRequest when it is cut short."""
    _check_headers(request)
    length = request.content_length
    if length is None:
        return _read_chunks(request, max_size)
    if length > max_size:
        raise _too_large(max_size)
    data: bytes = request.environ["wsgi.input"].read(length)
    if len(data) < length:
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
            f"Unsupported content type: '{request.mimetype[:100]}'. This API method only accepts 'application/json' requests, "
            "so send the header Content-Type: application/json."
        )
    encoding = request.environ.get("HTTP_CONTENT_ENCODING", "identity")
    if encoding.strip().lower() not in ("identity", ""):
        raise UnsupportedContentType(f"Unsupported content encoding: '{encoding[:100]}'. Send the body uncompressed.")


def _read_chunks(request: Request, max_size: int) -> bytes:
    """A body without an announced length; empty where the server cannot tell its end."""
    request.max_content_length = max_size
    try:
        return request.get_data(cache=False)
    except RequestEntityTooLarge:
        raise _too_large(max_size) from None


def _too_large(max_size: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than the {max_size} bytes that this server accepts.")


def _malformed(reason: str) -> InvalidRequest:
    return InvalidRequest(
        "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
        f"correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON: {reason}.)"
    )
