"""The table of URLs, and the page that lists it. An endpoint names the function that answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from werkzeug.routing import Map, Rule
from werkzeug.utils import import_string

from llmserve.api.context import Context, Request
from llmserve.api.responses import Response, json_response

CHAT = "llmserve.api.chat:create"
COMPLETIONS = "llmserve.api.completions:create"
ACT = "llmserve.api.models:act"

URLS = Map(
    [
        Rule("/", methods=["GET"], endpoint="llmserve.api.urls:index"),
        Rule("/health", methods=["GET"], endpoint="llmserve.api.ops:health"),
        Rule("/livez", methods=["GET"], endpoint="llmserve.api.ops:livez"),
        Rule("/readyz", methods=["GET"], endpoint="llmserve.api.ops:readyz"),
        Rule("/v1/chat/completions", methods=["POST"], endpoint=CHAT),
        Rule("/v1/completions", methods=["POST"], endpoint=COMPLETIONS),
        Rule("/v1/models", methods=["GET"], endpoint="llmserve.api.models:index"),
        Rule("/v1/models/<path:name>", methods=["GET"], endpoint="llmserve.api.models:retrieve"),
        Rule("/v1/models/<path:name>", methods=["POST"], endpoint=ACT),
    ],
    strict_slashes=False,
    merge_slashes=False,
)

LONG = frozenset({CHAT, COMPLETIONS, ACT})
"""Endpoints that may take long: they pass the gate that keeps threads free for the others."""


@cache
def handler(endpoint: str) -> Callable[..., Response]:
    """The function of an endpoint, given a context, a request and what the URL says. The first call imports its module: the
    first answer of /health is not to wait for what only chats need.
    """
    function: Callable[..., Response] = import_string(endpoint)
    return function


def preload() -> None:
    """Import every handler."""
    for rule in URLS.iter_rules():
        handler(rule.endpoint)


def index(ctx: Context, request: Request) -> Response:
    """What is served here, for somebody who opens the server in a browser."""
    endpoints = [
        f"{method} {rule.rule}" for rule in URLS.iter_rules() for method in sorted(rule.methods or ()) if method != "HEAD"
    ]
    return json_response({"service": "LLM Inference Server", "endpoints": endpoints})
