"""/v1/models: which models there are, what state they are in, load and unload them."""

from __future__ import annotations

from collections.abc import Callable

from llmserve.api import JSON
from llmserve.api.context import Context, Request
from llmserve.api.fields import OneOf, missing
from llmserve.api.responses import Response, json_response
from llmserve.config import ModelSpec

_ACTIONS = OneOf(("load", "unload", "reload"))


def index(ctx: Context, request: Request) -> Response:
    """Every name a request may use: ids and aliases."""
    models = [_summary(ctx, spec, name) for spec in ctx.registry.specs for name in spec.names]
    return json_response({"object": "list", "data": models})


def retrieve(ctx: Context, request: Request, name: str) -> Response:
    """One model, by id or alias, with what it is doing."""
    return json_response(_details(ctx, ctx.registry.resolve(name), name))


def act(ctx: Context, request: Request, name: str) -> Response:
    """Load, unload or reload a model; answers when that is done."""
    spec = ctx.registry.resolve(name)
    action = request.args.get("action")
    if action is None:
        raise missing("action")
    actions: dict[str, Callable[[str], None]] = {
        "load": ctx.registry.load,
        "unload": ctx.registry.unload,
        "reload": ctx.registry.reload,
    }
    request.record.model = spec.id
    actions[_ACTIONS.parse(action, "action", [])](spec.id)
    return json_response(_details(ctx, spec, name))


def _summary(ctx: Context, spec: ModelSpec, name: str) -> dict[str, JSON]:
    """OpenAI's fields; `root` names the model behind an alias."""
    created = ctx.registry.status(spec.id).created
    return {"id": name, "object": "model", "created": created, "owned_by": "llmserve", "root": spec.id, "parent": None}


def _details(ctx: Context, spec: ModelSpec, name: str) -> dict[str, JSON]:
    status = ctx.registry.status(spec.id)
    info = status.info
    return _summary(ctx, spec, name) | {
        "aliases": list(spec.aliases),
        "state": str(status.state),
        "reason": status.reason,
        "engine": info.name if info else None,
        "engine_reason": info.reason if info else None,
        "context_length": info.context_length if info else None,
        "slots": info.num_slots if info else None,
        "running": status.running,
        "waiting": status.waiting,
        "statistics": status.statistics._asdict(),
        "memory": {"weights": info.weights_bytes, "kv_cache": info.kv_cache_bytes} if info else None,
    }
