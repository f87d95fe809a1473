"""The shapes of answers, as JSON schemas: for /openapi.json. What is served is held against them by tests, never at run time."""

from __future__ import annotations

from collections.abc import Mapping

from llmserve.api import JSON, urls


def _object(optional: Mapping[str, JSON] | None = None, /, **required: JSON) -> JSON:
    return {"type": "object", "properties": required | dict(optional or {}), "required": list(required)}


def _list(item: JSON) -> JSON:
    return {"type": "array", "items": item}


def _nullable(schema: JSON) -> JSON:
    return {"anyOf": [schema, {"type": "null"}]}


STRING: JSON = {"type": "string"}
_INTEGER: JSON = {"type": "integer"}
_NUMBER: JSON = {"type": "number"}
_NULLABLE_STRING: JSON = {"type": ["string", "null"]}
_NULLABLE_INTEGER: JSON = {"type": ["integer", "null"]}
_NULLABLE_NUMBER: JSON = {"type": ["number", "null"]}

ERROR = _object(error=_object(message=STRING, type=STRING, param=_NULLABLE_STRING, code=_NULLABLE_STRING))

_USAGE = _object(
    prompt_tokens=_INTEGER,
    completion_tokens=_INTEGER,
    total_tokens=_INTEGER,
    prompt_tokens_details=_object(cached_tokens=_NULLABLE_INTEGER),
)
_FUNCTION = _object(name=STRING, arguments=STRING)
_CALL = _object(id=STRING, type={"const": "function"}, function=_FUNCTION)
_CALL_DELTA = _object(
    {"id": STRING, "type": {"const": "function"}},
    index=_INTEGER,
    function=_object({"name": STRING}, arguments=STRING),
)
_MESSAGE = _object(
    {"reasoning_content": STRING, "tool_calls": _list(_CALL), "function_call": _FUNCTION},
    role={"const": "assistant"},
    content=_NULLABLE_STRING,
    refusal=_NULLABLE_STRING,
)
_MESSAGE_DELTA = _object(
    {
        "role": {"const": "assistant"},
        "content": _NULLABLE_STRING,
        "refusal": _NULLABLE_STRING,
        "reasoning_content": STRING,
        "tool_calls": _list(_CALL_DELTA),
        "function_call": _object({"name": STRING}, arguments=STRING),
    }
)
_CHAT_TOKEN: Mapping[str, JSON] = {"token": STRING, "logprob": _NUMBER, "bytes": _list(_INTEGER)}
_CHAT_LOGPROBS = _object(
    content=_list(_object(top_logprobs=_list(_object(**_CHAT_TOKEN)), **_CHAT_TOKEN)), refusal={"type": "null"}
)
_CHAT_END: JSON = {"enum": ["stop", "length", "tool_calls", "function_call"]}
_COMPLETION_LOGPROBS = _object(
    tokens=_list(STRING),
    token_logprobs=_list(_NULLABLE_NUMBER),
    top_logprobs=_list(_nullable({"type": "object", "additionalProperties": _NUMBER})),
    text_offset=_list(_INTEGER),
)
_COMPLETION_END: JSON = {"enum": ["stop", "length"]}


def _answer(kind: str, choice: JSON, optional: Mapping[str, JSON] | None = None, **required: JSON) -> JSON:
    head = {"id": STRING, "object": {"const": kind}, "created": _INTEGER, "model": STRING}
    return _object({"service_tier": STRING, **(optional or {})}, **head, choices=_list(choice), **required)


def _chat_choice(end: JSON, **message: JSON) -> JSON:
    return _object(index=_INTEGER, **message, logprobs=_nullable(_CHAT_LOGPROBS), finish_reason=end)


def _completion_choice(end: JSON) -> JSON:
    return _object(index=_INTEGER, text=STRING, logprobs=_nullable(_COMPLETION_LOGPROBS), finish_reason=end)


_LISTED: Mapping[str, JSON] = {
    "id": STRING,
    "object": {"const": "model"},
    "created": _INTEGER,
    "owned_by": STRING,
    "root": STRING,
    "parent": {"type": "null"},
}
_MODEL = _object(
    **_LISTED,
    aliases=_list(STRING),
    state={"enum": ["unloaded", "loading", "ready", "draining", "failed"]},
    reason=_NULLABLE_STRING,
    engine=_NULLABLE_STRING,
    engine_reason=_NULLABLE_STRING,
    context_length=_NULLABLE_INTEGER,
    slots=_NULLABLE_INTEGER,
    running=_INTEGER,
    waiting=_INTEGER,
    statistics={"type": "object", "additionalProperties": _NULLABLE_NUMBER},
    memory=_nullable(_object(weights=_INTEGER, kv_cache=_INTEGER)),
)
_EMBEDDING = _object(object={"const": "embedding"}, index=_INTEGER, embedding={"anyOf": [_list(_NUMBER), STRING]})

ANSWERS: Mapping[str, JSON] = {
    urls.INDEX: _object(service=STRING, endpoints=_list(STRING)),
    urls.OPENAPI: _object(openapi=STRING, info={"type": "object"}, paths={"type": "object"}, components={"type": "object"}),
    urls.DOCS: STRING,
    urls.HEALTH: _object(status={"enum": ["starting", "healthy", "degraded"]}, service=STRING, uptime=_NUMBER, models=_INTEGER),
    urls.LIVEZ: _object(status={"const": "alive"}),
    urls.READYZ: _object(status={"const": "ready"}),
    urls.CHAT: _answer("chat.completion", _chat_choice(_CHAT_END, message=_MESSAGE), usage=_USAGE),
    urls.COMPLETIONS: _answer("text_completion", _completion_choice(_COMPLETION_END), usage=_USAGE),
    urls.EMBEDDINGS: _object(
        object={"const": "list"},
        data=_list(_EMBEDDING),
        model=STRING,
        usage=_object(prompt_tokens=_INTEGER, total_tokens=_INTEGER),
    ),
    urls.TOKENIZE: _object(
        {"pieces": _list({"anyOf": [STRING, _list(_INTEGER)]})},
        tokens=_list(_INTEGER),
        count=_INTEGER,
        max_model_len=_INTEGER,
    ),
    urls.DETOKENIZE: _object(prompt=STRING, content=STRING),
    urls.APPLY_TEMPLATE: _object(prompt=STRING),
    urls.MODELS: _object(object={"const": "list"}, data=_list(_object(**_LISTED))),
    urls.RETRIEVE: _MODEL,
    urls.ACT: _MODEL,
}
"""Of a 200."""

NOT_READY = _object(status={"enum": ["starting", "draining"]})
"""Of /readyz, with a 503."""

CHUNKS: Mapping[str, JSON] = {
    urls.CHAT: _answer(
        "chat.completion.chunk", _chat_choice(_nullable(_CHAT_END), delta=_MESSAGE_DELTA), {"usage": _nullable(_USAGE)}
    ),
    urls.COMPLETIONS: _answer("text_completion", _completion_choice(_nullable(_COMPLETION_END)), {"usage": _nullable(_USAGE)}),
}
"""What each event of a stream carries; one that breaks off ends with an error instead."""
