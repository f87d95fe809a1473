"""The shapes of requests: JSON of a body in, frozen structs out, or a 400 that names the parameter.

A struct's fields have the names of the wire; its methods give what the engine understands. Knows no HTTP and no model.
"""

from __future__ import annotations

import json

from llmserve.api import JSON
from llmserve.api.fields import (
    Array,
    Boolean,
    Either,
    Integer,
    Nullable,
    Number,
    Object,
    OneOf,
    String,
    Strings,
    Struct,
    Tagged,
    Unsupported,
    optional,
    required,
)
from llmserve.api.tools import (
    FUNCTION_CALL,
    FUNCTIONS,
    TOOL_CHOICE,
    TOOLS,
    FunctionDefinition,
    FunctionName,
    Tool,
    ToolChoice,
    ToolUse,
    resolve,
    resolve_legacy,
)
from llmserve.engine.generation import SamplingParams
from llmserve.errors import InvalidParameter, InvalidRequest

_MAX_DEPTH = 64  # of arrays and objects in each other
_INT32_MAX = 2**31 - 1
_MAX_STOP_STRINGS = 16
_LEGACY_CALL_ID = "call_function"  # calls had no ids then


def _refuse_constant(name: str) -> JSON:
    raise ValueError(f"{name} is not JSON")


_DECODE = json.JSONDecoder(parse_constant=_refuse_constant).decode


class TextPart(Struct):
    type: str = required(String())
    text: str = required(String())


class RefusalPart(Struct):
    type: str = required(String())
    refusal: str = required(String())

    @property
    def text(self) -> str:
        return self.refusal


_TEXT = Either(String(), Array(Tagged("type", {"text": TextPart})))
_ASSISTANT_CONTENT = Either(String(), Array(Tagged("type", {"text": TextPart, "refusal": RefusalPart})))

Content = str | tuple[TextPart | RefusalPart, ...] | None


class FunctionCall(Struct):
    name: str = required(String())
    arguments: str = required(String())

    def for_template(self) -> dict[str, JSON]:
        """The arguments as the object they spell: templates expect one. Text that spells none stays text."""
        try:
            arguments = parse_json(self.arguments)
        except ValueError:
            arguments = self.arguments
        return {"name": self.name, "arguments": arguments if isinstance(arguments, dict) else self.arguments}


class ToolCall(Struct):
    type: str = optional(OneOf(("function",)), "function")
    id: str = required(String())
    function: FunctionCall = required(FunctionCall)

    def for_template(self) -> dict[str, JSON]:
        return {"id": self.id, "type": "function", "function": self.function.for_template()}


class SystemMessage(Struct):
    """From the developer: the current name of the same role."""

    role: str = required(String())
    content: Content = required(Nullable(_TEXT))
    name: str | None = optional(String())

    def for_template(self) -> dict[str, JSON]:
        return _named({"role": "system", "content": _text(self.content)}, self.name)


class UserMessage(Struct):
    role: str = required(String())
    content: Content = required(Nullable(_TEXT))
    name: str | None = optional(String())

    def for_template(self) -> dict[str, JSON]:
        return _named({"role": "user", "content": _text(self.content)}, self.name)


class AssistantMessage(Struct):
    role: str = required(String())
    content: Content = optional(_ASSISTANT_CONTENT)
    refusal: str | None = optional(String())
    name: str | None = optional(String())
    tool_calls: tuple[ToolCall, ...] = optional(Array(ToolCall), ())
    function_call: FunctionCall | None = optional(FunctionCall)
    reasoning_content: str | None = optional(String())
    audio: None = optional(Unsupported(Object()))

    def for_template(self) -> dict[str, JSON]:
        message = _named({"role": "assistant", "content": _text(self.content) or self.refusal or ""}, self.name)
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        elif self.function_call is not None:
            call = {"id": _LEGACY_CALL_ID, "type": "function", "function": self.function_call.for_template()}
            message["tool_calls"] = [call]
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        return message


class ToolMessage(Struct):
    role: str = required(String())
    content: Content = required(Nullable(_TEXT))
    tool_call_id: str = required(String(min_length=1))
    name: str | None = optional(String())

    def for_template(self) -> dict[str, JSON]:
        message = {"role": "tool", "content": _text(self.content), "tool_call_id": self.tool_call_id}
        return _named(message, self.name)


class FunctionMessage(Struct):
    """A result of the older `function_call`."""

    role: str = required(String())
    content: Content = required(Nullable(_TEXT))
    name: str = required(String(min_length=1))

    def for_template(self) -> dict[str, JSON]:
        return {"role": "tool", "content": _text(self.content), "tool_call_id": _LEGACY_CALL_ID, "name": self.name}


Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage

MESSAGE = Tagged(
    "role",
    {
        "system": SystemMessage,
        "developer": SystemMessage,
        "user": UserMessage,
        "assistant": AssistantMessage,
        "tool": ToolMessage,
        "function": FunctionMessage,
    },
)


class StreamOptions(Struct):
    include_usage: bool = optional(Boolean(), False)
    include_obfuscation: bool = optional(Boolean(), False)  # padding against eavesdroppers: none is ever sent


_RESPONSE_FORMAT = Tagged("type", dict.fromkeys(("text", "json_object", "json_schema"), Object()))


class ChatRequest(Struct):
    """The body of POST /v1/chat/completions: what is honoured, what is only checked, what is refused."""

    model: str = required(String())
    messages: tuple[Message, ...] = required(Array(MESSAGE, min_length=1))
    max_completion_tokens: int | None = optional(Integer(1, _INT32_MAX))
    max_tokens: int | None = optional(Integer(1, _INT32_MAX))
    n: int = optional(Integer(1, 128), 1)
    stop: str | tuple[str, ...] = optional(Either(String(1), Array(String(1), max_length=_MAX_STOP_STRINGS)), ())
    stream: bool = optional(Boolean(), False)
    stream_options: StreamOptions | None = optional(StreamOptions)
    seed: int | None = optional(Integer(-(2**63), 2**63 - 1))
    temperature: float = optional(Number(0, 2), 1.0)
    top_p: float = optional(Number(0, 1), 1.0)
    top_k: int = optional(Integer(-1, _INT32_MAX), 0)
    min_p: float = optional(Number(0, 1), 0.0)
    presence_penalty: float = optional(Number(-2, 2), 0.0)
    frequency_penalty: float = optional(Number(-2, 2), 0.0)
    repetition_penalty: float = optional(Number(0.01, 2), 1.0)

    tools: tuple[Tool, ...] = optional(TOOLS, ())
    tool_choice: ToolChoice | None = optional(TOOL_CHOICE)
    parallel_tool_calls: bool = optional(Boolean(), True)
    functions: tuple[FunctionDefinition, ...] = optional(FUNCTIONS, ())
    function_call: str | FunctionName | None = optional(FUNCTION_CALL)

    user: str | None = optional(String())
    safety_identifier: str | None = optional(String())
    prompt_cache_key: str | None = optional(String())
    prompt_cache_retention: str | None = optional(OneOf(("in_memory", "in-memory", "24h")))
    prompt_cache_options: dict[str, JSON] | None = optional(Object())
    metadata: dict[str, str] | None = optional(Strings(16, String(max_length=64), String(max_length=512)))
    store: bool = optional(Boolean(), False)
    service_tier: str | None = optional(OneOf(("auto", "default", "flex", "scale", "priority", "fast")))
    prediction: dict[str, JSON] | None = optional(Object())
    reasoning_effort: str | None = optional(OneOf(("none", "minimal", "low", "medium", "high", "xhigh", "max")))
    verbosity: str | None = optional(OneOf(("low", "medium", "high")))

    logprobs: bool = optional(Unsupported(Boolean(), (False,)), False)
    top_logprobs: None = optional(Unsupported(Integer(0, 20), (0,)))
    logit_bias: None = optional(Unsupported(Object(), ({},)))
    response_format: None = optional(Unsupported(_RESPONSE_FORMAT, ({"type": "text"},)))
    modalities: None = optional(Unsupported(Array(OneOf(("text", "audio"))), (["text"],)))
    audio: None = optional(Unsupported(Object()))
    web_search_options: None = optional(Unsupported(Object()))
    moderation: None = optional(Unsupported(Object()))

    @property
    def token_limit(self) -> int | None:
        """Most tokens of one choice; None is what the context leaves."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def tool_use(self) -> ToolUse:
        """Raises InvalidParameter."""
        if not self.tools and (self.functions or self.function_call is not None):
            return resolve_legacy(self.functions, self.function_call)
        return resolve(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


def parse_chat(body: dict[str, JSON]) -> tuple[ChatRequest, list[str]]:
    """A checked chat request, and the paths of the fields that nothing knows. Raises InvalidRequest."""
    if body.get("model") is None:
        raise InvalidRequest("you must provide a model parameter")
    ignored: list[str] = []
    chat = ChatRequest.parse(body, "", ignored)
    if chat.stream_options is not None and not chat.stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise InvalidParameter(message, param="stream_options", code=None)
    _check_results(chat.messages)
    return chat, ignored


def _check_results(messages: tuple[Message, ...]) -> None:
    """Raises InvalidParameter for a tool's result that no call asked for."""
    asked = False
    for index, message in enumerate(messages):
        if isinstance(message, ToolMessage) and not asked:
            raise InvalidParameter(
                "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with 'tool_calls'.",
                param=f"messages.[{index}].role",
                code=None,
            )
        asked = isinstance(message, ToolMessage) or (isinstance(message, AssistantMessage) and bool(message.tool_calls))


def parse_json(text: str) -> JSON:
    """JSON that can be worked with: ValueError for what is malformed, NaN, nested too deeply, or not encodable as UTF-8."""
    try:
        value = _DECODE(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > _MAX_DEPTH:
        _check_depth(value)
    if "\\u" in text:  # the escape of half a surrogate pair makes a string that no tokenizer takes
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _check_depth(value: JSON) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [item for each in level if isinstance(each, list | dict) for item in _members(each)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _members(value: list[JSON] | dict[str, JSON]) -> list[JSON]:
    return list(value.values()) if isinstance(value, dict) else value


def _text(content: Content) -> str:
    """One string: templates want no parts. Parts stay apart by a line break."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def _named(message: dict[str, JSON], name: str | None) -> dict[str, JSON]:
    return message if name is None else message | {"name": name}
