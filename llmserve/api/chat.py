"""POST /v1/chat/completions: parse, look into the cache or submit, follow, render."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from copy import copy
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from llmserve import response_cache
from llmserve.api import JSON, body, render, schema
from llmserve.api.connection import LOOK_INTERVAL, Watch
from llmserve.api.context import Context, Request, unique
from llmserve.api.render import ChunkStream, Tally
from llmserve.api.responses import DONE, HeaderList, Response, encode, encoded_response, event_stream, frame
from llmserve.api.schema import ChatRequest
from llmserve.engine.generation import Delta, Event, Failed, Generation, GenerationParams, SamplingParams
from llmserve.errors import ContextLengthExceeded, TemplateError
from llmserve.response_cache import Answer

if TYPE_CHECKING:
    from llmserve.engine.engine import Engine

_LARGEST_REMEMBERED_BODY = 8192  # bytes
_REMEMBERED_BODIES = 256
_COSTLY_TO_COUNT = 256 * 1024  # characters; tokenizing takes a hundred times the text's memory for a moment
_MAX_IGNORED_NAMES = 20


class ParsedChat(NamedTuple):
    """All that a body says, whatever model answers it. `key` lacks only the model; None is an answer that chance decides."""

    request: ChatRequest
    messages: list[JSON]
    sampling: SamplingParams
    key: bytes | None
    headers: HeaderList


class _Rendering(NamedTuple):
    """What is kept with a remembered answer for those who want it whole."""

    rest: bytes
    tally: Tally


def parse(data: bytes) -> ParsedChat:
    """Raises InvalidRequest. Depends on nothing but the bytes, so what it returns may be remembered and shared."""
    chat, ignored = schema.parse_chat(body.parse_object(data))
    messages = [message.for_template() for message in chat.messages]
    sampling = chat.sampling()
    key = response_cache.key(sampling, "chat", messages, chat.token_limit, chat.n, chat.stop_strings)
    return ParsedChat(chat, messages, sampling, key, [("X-LLMServe-Ignored", _listing(ignored))] if ignored else [])


_parse_again = lru_cache(_REMEMBERED_BODIES)(parse)  # so that a cached answer costs little more than its lookup


def create(ctx: Context, request: Request) -> Response:
    """Answer a chat, whole or as a stream."""
    server = ctx.config.server
    data = body.read(request, server.max_body_size)
    parsed = _parse_again(data) if len(data) <= _LARGEST_REMEMBERED_BODY else parse(data)
    chat = parsed.request
    model_id = ctx.registry.resolve(chat.model).id
    request.record.model = model_id
    watch = Watch(request.environ, request.received + server.request_timeout)
    answer = _open(ctx, request, parsed, model_id, watch)
    request.record.cache = answer.outcome
    try:
        batches = _follow(answer, watch, request)
        headers = _headers(answer) + parsed.headers
        if chat.stream:
            # Waits for the first event or a moment of silence: an engine that fails at once still gets its status, and
            # a client that has to wait still gets its headers.
            batches = chain([next(batches)], batches)
            chunks = ChunkStream(_head(parsed, model_id, "chat.completion.chunk"), chat.n, chat.include_usage)
            request.record.tally = chunks.tally
            response = event_stream(request, _writes(chunks, batches), headers, server.ping_interval)
        else:
            head = encode(_head(parsed, model_id, "chat.completion"))
            rest = _rest(request, parsed, answer, batches)
            response = encoded_response(head[:-1] + b"," + rest[1:], headers=headers)
    except BaseException:
        answer.close()
        raise
    response.call_on_close(answer.close)  # also closes a stream that is never read, whose `finally` would never run
    return response


def _open(ctx: Context, request: Request, parsed: ParsedChat, model_id: str, watch: Watch) -> Answer:
    """The answer, remembered or begun. All that a client can do wrong has been found when this returns."""
    directives = request.environ.get("HTTP_CACHE_CONTROL", "").lower()
    may_store = "no-store" not in directives
    may_lookup = may_store and "no-cache" not in directives
    if may_lookup and (answer := ctx.cache.find(_key(parsed, ctx.registry.identity(model_id)))) is not None:
        return answer
    with ctx.registry.use(model_id, watch) as engine:
        key = _key(parsed, engine.info.identity)
        return ctx.cache.open(key, lambda: _submit(engine, parsed), may_lookup=may_lookup, may_store=may_store)


def _key(parsed: ParsedChat, identity: str | None) -> bytes | None:
    return None if parsed.key is None or identity is None else parsed.key + identity.encode()


def _submit(engine: Engine, parsed: ParsedChat) -> Generation:
    chat = parsed.request
    segments = engine.chat_template.render(parsed.messages)
    num_characters = sum(len(segment.text) for segment in segments)
    if num_characters > _COSTLY_TO_COUNT:
        _check_length(num_characters // engine.tokenizer.max_piece_size, engine.context_length, "at least ")
    prompt_ids = engine.tokenizer.encode(segments)
    if not prompt_ids:
        raise TemplateError("The chat template makes an empty prompt of these messages.")
    _check_length(len(prompt_ids), engine.context_length)
    max_tokens = _max_tokens(chat.token_limit, len(prompt_ids), engine.context_length)
    return engine.submit(prompt_ids, GenerationParams(max_tokens, chat.n, chat.stop_strings, parsed.sampling))


def _check_length(num_prompt_tokens: int, context_length: int, qualifier: str = "") -> None:
    """Raises ContextLengthExceeded for a prompt that does not fit by itself."""
    if num_prompt_tokens > context_length:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context_length} tokens. However, your messages resulted in "
            f"{qualifier}{num_prompt_tokens} tokens. Please reduce the length of the messages.",
            param="messages",
        )


def _max_tokens(limit: int | None, num_prompt_tokens: int, context_length: int) -> int:
    """What one choice may take: what was asked for, else what the prompt leaves. Raises ContextLengthExceeded."""
    num_left = context_length - num_prompt_tokens
    wanted = limit or max(num_left, 1)
    if wanted > num_left:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context_length} tokens. However, you requested "
            f"{num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the messages, {wanted} in the completion). "
            "Please reduce the length of the messages or completion.",
            param="messages",
        )
    return wanted


def _follow(answer: Answer, watch: Watch, request: Request) -> Iterator[list[Event]]:
    """The events in batches as they come, an empty batch after each LOOK_INTERVAL of silence. Raises what ends them early."""
    while not answer.ended:
        events = answer.read(LOOK_INTERVAL)
        if not answer.ended:
            watch()
        if request.record.ttft is None and events and isinstance(events[0], Delta):
            request.record.ttft = time.monotonic() - request.received
        if events and isinstance(events[-1], Failed):
            if events[:-1]:
                yield events[:-1]
            raise copy(events[-1].error)
        yield events


def _rest(request: Request, parsed: ParsedChat, answer: Answer, batches: Iterator[list[Event]]) -> bytes:
    """The JSON of a whole answer but for its head. A repeated answer is rendered once; its length then costs nothing more."""
    rendering: _Rendering | None = answer.rendering
    if rendering is None:
        tally = Tally()
        rest = render.completion(parsed.request.n, chain.from_iterable(batches), tally)
        rendering = _Rendering(encode(rest), tally)
        answer.keep(rendering, len(rendering.rest))
    request.record.tally = rendering.tally
    return rendering.rest


def _writes(chunks: ChunkStream, batches: Iterator[list[Event]]) -> Iterator[bytes]:
    """What is to be written at once: the roles with the first batch, [DONE] with the last."""
    payloads = chunks.begin()
    for events in batches:
        payloads += chunks.add(events)
        yield b"".join(map(frame, payloads)) + (DONE if chunks.ended else b"")
        payloads = []


def _head(parsed: ParsedChat, model_id: str, kind: str) -> dict[str, JSON]:
    """What an answer, or each of its chunks, begins with."""
    head = {"id": f"chatcmpl-{unique()}", "object": kind, "created": int(time.time()), "model": model_id}
    return head if parsed.request.service_tier is None else head | {"service_tier": "default"}


def _headers(answer: Answer) -> HeaderList:
    headers = [("X-Cache", str(answer.outcome))]
    return headers if answer.age is None else [*headers, ("Age", str(int(answer.age)))]


def _listing(names: list[str]) -> str:
    """Names that a client made up, in a form and number that fit a header."""
    shown = [re.sub(r"[^\w.\[\]-]", "?", name[:64], flags=re.ASCII) for name in names[:_MAX_IGNORED_NAMES]]
    return ", ".join(shown + ["..."] * (len(names) > _MAX_IGNORED_NAMES))
