"""POST /v1/chat/completions: what a body asks for, and the prompt that its messages make."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from llmserve import response_cache
from llmserve.api import JSON, body, flow, render, schema
from llmserve.api.context import Context, Request
from llmserve.api.flow import Call, Prompt
from llmserve.api.message import MessageWriter
from llmserve.api.parameters import Guide, check_guide
from llmserve.api.render import ChatWriter, ChunkStream, Tally
from llmserve.api.responses import Response
from llmserve.api.schema import ChatRequest
from llmserve.api.tools import ToolUse
from llmserve.engine import tool_formats, tool_prompts
from llmserve.engine.generation import Event, GenerationParams, Grammar
from llmserve.engine.json_schema import without_others
from llmserve.engine.output_parser import THINK, OutputParser
from llmserve.errors import TemplateError

if TYPE_CHECKING:
    from llmserve.engine.chat_template import Segment
    from llmserve.engine.engine import Engine

_LARGEST_REMEMBERED_BODY = 8192  # bytes
_REMEMBERED_BODIES = 256


def parse(data: bytes) -> Call:
    """Raises InvalidRequest. Depends on nothing but the bytes, so what it returns may be remembered and shared."""
    chat, ignored = schema.parse_chat(body.parse_object(data))
    messages = [message.for_template() for message in chat.messages]
    use = chat.tool_use()
    key = response_cache.key(chat.sampling, "chat", messages, chat.shape, use)
    prompt = Prompt(key, partial(_prepare, chat, messages, use))
    return Call(chat.model, (prompt,), chat.n, chat.stream, ChatFormat(chat, use), tuple(ignored))


_parse_again = lru_cache(_REMEMBERED_BODIES)(parse)  # so that a cached answer costs little more than its lookup


def create(ctx: Context, request: Request) -> Response:
    """Answer a chat, whole or as a stream."""
    data = body.read(request, ctx.config.server.max_body_size)
    call = _parse_again(data) if len(data) <= _LARGEST_REMEMBERED_BODY else parse(data)
    if ctx.registry.resolve(call.model).reasoning:
        assert isinstance(call.format, ChatFormat)
        call = call._replace(format=replace(call.format, reasoning=True))
    return flow.respond(ctx, request, call)


def _prepare(chat: ChatRequest, messages: list[JSON], use: ToolUse, engine: Engine) -> tuple[list[int], GenerationParams]:
    segments = render_prompt(engine, chat, messages, use)
    prompt_ids = flow.encode_prompt(engine, segments, "messages")
    if not prompt_ids:
        raise TemplateError("The chat template makes an empty prompt of these messages.")
    max_tokens = flow.choose_max_tokens(chat.token_limit, len(prompt_ids), engine.context_length, "messages")
    params = chat.params(max_tokens, engine)._replace(opening=_opening(segments))
    return prompt_ids, params._replace(grammar=_grammar(engine, use, params.grammar))


def render_prompt(engine: Engine, chat: ChatRequest, messages: list[JSON], use: ToolUse) -> tuple[Segment, ...]:
    """The prompt of a chat. A final message that is to be continued is what an answer begins with, as far as it goes; one that
    must be answered with a call ends where that begins.
    """
    flow.check_generates(engine)
    template = engine.chat_template
    shown = messages[:-1] if chat.continue_final_message else messages
    adapted, tools = tool_prompts.adapt(shown, use.functions, template.tools)
    add_prompt = chat.add_generation_prompt or chat.continue_final_message
    segments = template.render(adapted, add_generation_prompt=add_prompt, **chat.template_variables, **tools)
    if chat.continue_final_message:
        return flow.extend(segments, messages[-1]["content"])
    return template.extend(segments, tool_formats.opening(template.tools.form)) if use.forced else segments


def _grammar(engine: Engine, use: ToolUse, asked: Grammar | None) -> Grammar | None:
    """What an answer is kept within. `asked` is what was asked for beside tools: of that form is what is no call.

    Without it, a grammar keeps those calls right that are forced, or strict, or in a format that the model has only been told of.
    """
    support = engine.chat_template.tools
    if not use.functions:
        return asked
    if asked is not None and not use.forced:
        if asked.kind != "json_schema":
            return asked
        _check_schemas(use)
        guided = tool_formats.guided_grammar(support.form, use.functions, asked.text, parallel=use.parallel)
        return Grammar("lark", guided)
    if use.forced:
        _check_schemas(use)
        return Grammar("lark", tool_formats.forced_grammar(support.form, use.functions, parallel=use.parallel))
    if support.definitions and not any(function.strict for function in use.functions):
        return None
    if not support.form.closer:
        return None
    _check_schemas(use)
    return Grammar("lark", tool_formats.free_grammar(support.form, use.functions))


def _check_schemas(use: ToolUse) -> None:
    """Raises InvalidGrammar that names the function whose parameters cannot be enforced."""
    for index, function in enumerate(use.functions):
        path = f"functions[{index}].parameters" if use.legacy else f"tools[{index}].function.parameters"
        check_guide(Guide(path, Grammar("json_schema", json.dumps(without_others(function.schema)))))


def _opening(segments: Sequence[Segment]) -> str:
    """The block that the template has begun at the prompt's end, if it has."""
    text = "".join(segment.text for segment in segments[-2:])
    return THINK if text.rstrip().endswith(THINK) else ""


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a chat is written down. `reasoning`: whether the model's answers may begin with a block of it."""

    chat: ChatRequest
    use: ToolUse
    reasoning: bool = False

    def head(self, model_id: str, *, stream: bool) -> dict[str, JSON]:
        head = render.head("chatcmpl", "chat.completion.chunk" if stream else "chat.completion", model_id)
        return head if self.chat.service_tier is None else head | {"service_tier": "default"}

    def whole(self, events: Iterable[Event], tally: Tally) -> dict[str, JSON]:
        choices = render.gather(self.chat.n, events, tally)
        written = [render.chat_choice(choice, self.chat.logprobs, self._new_message()) for choice in choices]
        return {"choices": written, "usage": tally.usage()}

    def chunks(self, head: dict[str, JSON]) -> ChunkStream:
        writer = ChatWriter(self.chat.logprobs, self._new_message)
        return ChunkStream(head, self.chat.n, self.chat.include_usage, writer)

    def _new_message(self) -> MessageWriter:
        use = self.use
        if not use.functions and not self.reasoning:
            return MessageWriter()
        max_calls = None if use.parallel else 1
        parser = OutputParser(use.names, reasoning=self.reasoning, forced=use.forced, max_calls=max_calls)
        return MessageWriter(parser, legacy=use.legacy)
