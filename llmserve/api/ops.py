"""How the server itself is doing: for people, load balancers and supervisors."""

from __future__ import annotations

import time

from llmserve.api.context import Context, Request
from llmserve.api.responses import Response, json_response


def health(ctx: Context, request: Request) -> Response:
    """Always 200 while the process answers; the status says how well it is."""
    return json_response(
        {
            "status": _status(ctx),
            "service": "LLM Inference Server",
            "uptime": round(time.monotonic() - ctx.started, 2),
            "models": len(ctx.registry.specs),
        }
    )


def livez(ctx: Context, request: Request) -> Response:
    """Whether the process should be left alone."""
    return json_response({"status": "alive"})


def readyz(ctx: Context, request: Request) -> Response:
    """Whether requests should be sent here: 503 while startup models load and once the server drains."""
    if ctx.draining.is_set():
        return json_response({"status": "draining"}, 503, [("Retry-After", "1")])
    if ctx.registry.starting:
        return json_response({"status": "starting"}, 503, [("Retry-After", "1")])
    return json_response({"status": "ready"})


def _status(ctx: Context) -> str:
    if ctx.registry.starting:
        return "starting"
    failed = any(ctx.registry.status(spec.id).state == "failed" for spec in ctx.registry.specs)
    return "degraded" if failed else "healthy"
