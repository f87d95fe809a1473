"""POST /v1/chat/completions: what a body asks for, and the prompt that its messages make."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from llmserve import response_cache
from llmserve.api import JSON, body, flow, render, schema
from llmserve.api.context import Context, Request
from llmserve.api.flow import Call, Prompt
from llmserve.api.render import ChatWriter, ChunkStream, Tally
from llmserve.api.responses import Response
from llmserve.api.schema import ChatRequest
from llmserve.engine.generation import Event, GenerationParams
from llmserve.errors import TemplateError

if TYPE_CHECKING:
    from llmserve.engine.chat_template import ChatTemplate, Segment
    from llmserve.engine.engine import Engine

_LARGEST_REMEMBERED_BODY = 8192  # bytes
_REMEMBERED_BODIES = 256


def parse(data: bytes) -> Call:
    """Raises InvalidRequest. Depends on nothing but the bytes, so what it returns may be remembered and shared."""
    chat, ignored = schema.parse_chat(body.parse_object(data))
    messages = [message.for_template() for message in chat.messages]
    key = response_cache.key(chat.sampling, "chat", messages, chat.shape)
    prompt = Prompt(key, partial(_prepare, chat, messages))
    return Call(chat.model, (prompt,), chat.n, chat.stream, ChatFormat(chat), tuple(ignored))


_parse_again = lru_cache(_REMEMBERED_BODIES)(parse)  # so that a cached answer costs little more than its lookup


def create(ctx: Context, request: Request) -> Response:
    """Answer a chat, whole or as a stream."""
    data = body.read(request, ctx.config.server.max_body_size)
    return flow.respond(ctx, request, _parse_again(data) if len(data) <= _LARGEST_REMEMBERED_BODY else parse(data))


def _prepare(chat: ChatRequest, messages: list[JSON], engine: Engine) -> tuple[list[int], GenerationParams]:
    prompt_ids = flow.encode_prompt(engine, _segments(chat, messages, engine.chat_template), "messages")
    if not prompt_ids:
        raise TemplateError("The chat template makes an empty prompt of these messages.")
    max_tokens = flow.choose_max_tokens(chat.token_limit, len(prompt_ids), engine.context_length, "messages")
    return prompt_ids, chat.params(max_tokens, engine)


def _segments(chat: ChatRequest, messages: list[JSON], template: ChatTemplate) -> tuple[Segment, ...]:
    """The prompt. A final message that is to be continued is what an answer begins with, as far as it goes."""
    if not chat.continue_final_message:
        return template.render(messages, add_generation_prompt=chat.add_generation_prompt, **chat.chat_template_kwargs)
    return flow.extend(template.render(messages[:-1], **chat.chat_template_kwargs), messages[-1]["content"])


class ChatFormat:
    """How a chat is written down."""

    def __init__(self, chat: ChatRequest) -> None:
        self._chat = chat

    def head(self, model_id: str, *, stream: bool) -> dict[str, JSON]:
        head = render.head("chatcmpl", "chat.completion.chunk" if stream else "chat.completion", model_id)
        return head if self._chat.service_tier is None else head | {"service_tier": "default"}

    def whole(self, events: Iterable[Event], tally: Tally) -> dict[str, JSON]:
        choices = render.gather(self._chat.n, events, tally)
        return {"choices": [render.chat_choice(choice, self._chat.logprobs) for choice in choices], "usage": tally.usage()}

    def chunks(self, head: dict[str, JSON]) -> ChunkStream:
        return ChunkStream(head, self._chat.n, self._chat.include_usage, ChatWriter(self._chat.logprobs))
