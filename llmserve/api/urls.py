"""The table of URLs, and the page that lists it. An endpoint names the function that answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from werkzeug.routing import Map, Rule
from werkzeug.utils import import_string

from llmserve.api.context import Context, Request
from llmserve.api.responses import Response, json_response

INDEX = "llmserve.api.urls:index"
OPENAPI = "llmserve.api.openapi:serve"
DOCS = "llmserve.api.openapi:docs"
HEALTH = "llmserve.api.ops:health"
LIVEZ = "llmserve.api.ops:livez"
READYZ = "llmserve.api.ops:readyz"
CHAT = "llmserve.api.chat:create"
COMPLETIONS = "llmserve.api.completions:create"
EMBEDDINGS = "llmserve.api.embeddings:create"
TOKENIZE = "llmserve.api.tokens:tokenize"
DETOKENIZE = "llmserve.api.tokens:detokenize"
APPLY_TEMPLATE = "llmserve.api.tokens:apply_template"
MODELS = "llmserve.api.models:index"
RETRIEVE = "llmserve.api.models:retrieve"
ACT = "llmserve.api.models:act"

URLS = Map(
    [
        Rule("/", methods=["GET"], endpoint=INDEX),
        Rule("/openapi.json", methods=["GET"], endpoint=OPENAPI),
        Rule("/docs", methods=["GET"], endpoint=DOCS),
        Rule("/health", methods=["GET"], endpoint=HEALTH),
        Rule("/livez", methods=["GET"], endpoint=LIVEZ),
        Rule("/readyz", methods=["GET"], endpoint=READYZ),
        Rule("/v1/chat/completions", methods=["POST"], endpoint=CHAT),
        Rule("/v1/embeddings", methods=["POST"], endpoint=EMBEDDINGS),
        Rule("/tokenize", methods=["POST"], endpoint=TOKENIZE),
        Rule("/detokenize", methods=["POST"], endpoint=DETOKENIZE),
        Rule("/apply-template", methods=["POST"], endpoint=APPLY_TEMPLATE),
        Rule("/v1/completions", methods=["POST"], endpoint=COMPLETIONS),
        Rule("/v1/models", methods=["GET"], endpoint=MODELS),
        Rule("/v1/models/<path:name>", methods=["GET"], endpoint=RETRIEVE),
        Rule("/v1/models/<path:name>", methods=["POST"], endpoint=ACT),
    ],
    strict_slashes=False,
    merge_slashes=False,
)

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz"})
"""Probes carry no key."""

LONG = frozenset({CHAT, COMPLETIONS, EMBEDDINGS, TOKENIZE, DETOKENIZE, APPLY_TEMPLATE, ACT})
"""Endpoints that may take long: they pass the gate that keeps threads free for the others."""


@cache
def handler(endpoint: str) -> Callable[..., Response]:
    """The function of an endpoint, given a context, a request and what the URL says. The first call imports its module: the
    first answer of /health is not to wait for what only chats need.
    """
    function: Callable[..., Response] = import_string(endpoint)
    return function


def preload() -> None:
    """Import every handler that programs call; /docs is for who looks at it."""
    for endpoint in LONG:
        handler(endpoint)


def index(ctx: Context, request: Request) -> Response:
    """What is served here, for somebody who opens the server in a browser."""
    endpoints = [
        f"{method} {rule.rule}" for rule in URLS.iter_rules() for method in sorted(rule.methods or ()) if method != "HEAD"
    ]
    return json_response({"service": "LLM Inference Server", "endpoints": endpoints})
