"""Who may call, decided from a request's headers alone: Host, Origin, key; and what browsers are told of it.

Without the first two, any page that a person on this machine opens could use the server: by rebinding its own DNS name
to the loopback address, or with a POST that browsers send without asking first.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence

from llmserve.api.context import Request
from llmserve.api.responses import Response
from llmserve.api.urls import OPEN_PATHS
from llmserve.config import ServerConfig, is_loopback, split_bind
from llmserve.errors import ForbiddenHost, ForbiddenOrigin, InvalidAPIKey, MissingAPIKey

_LOOPBACK_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?")
_HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~, -]+", re.ASCII)
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_EXPOSED = "X-Request-Id, X-Cache, Age, X-LLMServe-Ignored, Retry-After, openai-processing-ms"
_PREFLIGHT_MAX_AGE = "7200"  # seconds; browsers take no more


class Access:
    """The rules of one configuration. Thread-safe."""

    def __init__(self, server: ServerConfig, binds: Sequence[str] = ()) -> None:
        """`binds` are where the server listens, if not where the configuration says."""
        self._hosts = frozenset(host.lower() for host in server.allowed_hosts)
        self._any_host = "*" in self._hosts or not (self._hosts or all(map(_is_loopback_only, binds or [server.bind])))
        self._origins = frozenset(origin.lower().rstrip("/") for origin in server.cors_origins)
        self._keys = tuple(key.encode() for key in server.api_keys)

    def check(self, request: Request) -> None:
        """Raises ForbiddenHost, ForbiddenOrigin or InvalidAPIKey."""
        self._check_host(request)
        self._check_origin(request)
        if self._keys and request.method != "OPTIONS" and request.path not in OPEN_PATHS:
            self._check_key(request)

    def headers(self, request: Request) -> list[tuple[str, str]]:
        """What tells browsers whether the page may read this answer, be it an error."""
        origin = request.environ.get("HTTP_ORIGIN")
        if origin is None or not self._knows(origin):
            return [("Vary", "Origin")]
        return [("Vary", "Origin"), ("Access-Control-Allow-Origin", origin), ("Access-Control-Expose-Headers", _EXPOSED)]

    def options(self, request: Request, allowed: str) -> Response:
        """What may be sent to a URL. The headers asked for are repeated: `*` would not cover Authorization."""
        headers = [("Allow", allowed)]
        if "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in request.environ:
            headers += [("Access-Control-Allow-Methods", allowed), ("Access-Control-Max-Age", _PREFLIGHT_MAX_AGE)]
            wanted = request.environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
            if _HEADER_NAMES.fullmatch(wanted):
                headers.append(("Access-Control-Allow-Headers", wanted))
        return Response([], 204, headers)

    def _check_host(self, request: Request) -> None:
        header = request.environ.get("HTTP_HOST")
        if self._any_host or not header:  # browsers always send one
            return
        name = _host_name(header)
        if not is_loopback(name) and name not in self._hosts:
            raise ForbiddenHost(f"The host '{name}' is not served here; server.allowed_hosts can name it.")

    def _check_origin(self, request: Request) -> None:
        origin = request.environ.get("HTTP_ORIGIN")
        if origin is None or request.method in _SAFE_METHODS or self._knows(origin):
            return
        if origin.partition("://")[2].lower() != request.environ.get("HTTP_HOST", "").lower():
            raise ForbiddenOrigin(f"Pages of '{origin}' may not call this server; server.cors_origins can name it.")

    def _check_key(self, request: Request) -> None:
        scheme, _, token = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else request.environ.get("HTTP_X_API_KEY", "")
        if not key:
            raise MissingAPIKey(
                "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
                "(i.e. Authorization: Bearer YOUR_KEY)."
            )
        given = key.encode("utf-8", "surrogateescape")
        # Every key is compared, and each in constant time: how long it takes tells nothing.
        if not sum(hmac.compare_digest(given, each) for each in self._keys):
            raise InvalidAPIKey("Incorrect API key provided.")

    def _knows(self, origin: str) -> bool:
        return bool(_LOOPBACK_ORIGIN.fullmatch(origin)) or origin.lower() in self._origins or "*" in self._origins


def _is_loopback_only(bind: str) -> bool:
    """A socket file counts as not: browsers cannot reach it, and whatever passes requests on to it names any host."""
    return not bind.startswith(("unix:", "fd://")) and is_loopback(split_bind(bind)[0])


def _host_name(header: str) -> str:
    """The name in a Host header: without the port, an IPv6 address without its brackets."""
    name = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
    return name.lower().rstrip(".")
