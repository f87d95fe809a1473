"""The table of URLs, and the page that lists it. An endpoint is the function that answers."""

from __future__ import annotations

from werkzeug.routing import Map, Rule

from llmserve.api import chat, models, ops
from llmserve.api.context import Context, Request
from llmserve.api.responses import Response, json_response


def index(ctx: Context, request: Request) -> Response:
    """What is served here, for somebody who opens the server in a browser."""
    endpoints = [
        f"{method} {rule.rule}" for rule in URLS.iter_rules() for method in sorted(rule.methods or ()) if method != "HEAD"
    ]
    return json_response({"service": "LLM Inference Server", "endpoints": endpoints})


URLS = Map(
    [
        Rule("/", methods=["GET"], endpoint=index),
        Rule("/health", methods=["GET"], endpoint=ops.health),
        Rule("/livez", methods=["GET"], endpoint=ops.livez),
        Rule("/readyz", methods=["GET"], endpoint=ops.readyz),
        Rule("/v1/chat/completions", methods=["POST"], endpoint=chat.create),
        Rule("/v1/models", methods=["GET"], endpoint=models.index),
        Rule("/v1/models/<path:name>", methods=["GET"], endpoint=models.retrieve),
        Rule("/v1/models/<path:name>", methods=["POST"], endpoint=models.act),
    ],
    strict_slashes=False,
    merge_slashes=False,
)

LONG = frozenset({chat.create, models.act})
"""Endpoints that may take long: they pass the gate that keeps threads free for the others."""
