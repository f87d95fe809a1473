"""The shapes of requests: JSON of a body in, frozen structs out, or a 400 that names the parameter.

A struct's fields have the names of the wire; its methods give what the engine understands. Knows no HTTP and no model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llmserve.api import JSON
from llmserve.api.fields import (
    Array,
    Boolean,
    Either,
    Integer,
    Nullable,
    Object,
    OneOf,
    String,
    Struct,
    Tagged,
    Unsupported,
    optional,
    passive,
    required,
)
from llmserve.api.parameters import (
    INT32_MAX,
    RESPONSE_FORMAT,
    GenerationFields,
    Guide,
    JSONObjectFormat,
    JSONSchemaFormat,
    ResponseFormat,
    check_fields,
    check_model,
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
from llmserve.engine.generation import GenerationParams, Grammar
from llmserve.engine.json_schema import without_others
from llmserve.errors import InvalidParameter

if TYPE_CHECKING:
    from llmserve.engine.engine import Engine

_LEGACY_CALL_ID = "call_function"  # calls had no ids then
_MAX_DEPTH = 64  # of arrays and objects in each other


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


class ChatRequest(GenerationFields):
    """The body of POST /v1/chat/completions: what is honoured, what is only checked, what is refused."""

    messages: tuple[Message, ...] = required(Array(MESSAGE, min_length=1))
    max_completion_tokens: int | None = optional(Integer(1, INT32_MAX))
    logprobs: bool = optional(Boolean(), False)
    top_logprobs: int | None = optional(Integer(0, 20))
    response_format: ResponseFormat | None = optional(RESPONSE_FORMAT)
    continue_final_message: bool = optional(Boolean(), False)
    add_generation_prompt: bool = optional(Boolean(), True)
    chat_template_kwargs: dict[str, JSON] = optional(Object(), {})
    reasoning_effort: str | None = optional(OneOf(("none", "minimal", "low", "medium", "high", "xhigh", "max")))

    tools: tuple[Tool, ...] = optional(TOOLS, ())
    tool_choice: ToolChoice | None = optional(TOOL_CHOICE)
    parallel_tool_calls: bool = optional(Boolean(), True)
    functions: tuple[FunctionDefinition, ...] = optional(FUNCTIONS, ())
    function_call: str | FunctionName | None = optional(FUNCTION_CALL)

    safety_identifier: str | None = passive(String())
    prompt_cache_key: str | None = passive(String())
    prompt_cache_retention: str | None = passive(OneOf(("in_memory", "in-memory", "24h")))
    prompt_cache_options: dict[str, JSON] | None = passive(Object())
    store: bool = passive(Boolean(), False)
    prediction: dict[str, JSON] | None = passive(Object())
    verbosity: str | None = passive(OneOf(("low", "medium", "high")))

    modalities: None = optional(Unsupported(Array(OneOf(("text", "audio"))), (["text"],)))
    audio: None = optional(Unsupported(Object()))
    web_search_options: None = optional(Unsupported(Object()))
    moderation: None = optional(Unsupported(Object()))

    @property
    def token_limit(self) -> int | None:
        """Most tokens of one choice; None is what the context leaves."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def template_variables(self) -> dict[str, JSON]:
        """What the chat template is told beside messages and tools. Families switch reasoning by one name or the other."""
        if self.reasoning_effort is None:
            return self.chat_template_kwargs
        switches = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.reasoning_effort != "none"}
        return switches | self.chat_template_kwargs

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to each token whose scores are asked for; None asks for no scores at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def guides(self) -> list[Guide]:
        guides = super().guides
        if isinstance(self.response_format, JSONObjectFormat):
            guides.insert(0, Guide("response_format", Grammar("json_schema", '{"type": "object"}')))
        elif isinstance(self.response_format, JSONSchemaFormat):
            schema = json.dumps(without_others(self.response_format.json_schema.schema), ensure_ascii=False)
            guides.insert(0, Guide("response_format.json_schema.schema", Grammar("json_schema", schema)))
        return guides

    def tool_use(self) -> ToolUse:
        """Raises InvalidParameter."""
        if not self.tools and (self.functions or self.function_call is not None):
            return resolve_legacy(self.functions, self.function_call)
        return resolve(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)

    @property
    def shape(self) -> tuple[Any, ...]:
        opening = (self.continue_final_message, self.add_generation_prompt, self.template_variables)
        return *super().shape, self.token_limit, self.num_logprobs, opening

    def params(self, max_tokens: int, engine: Engine) -> GenerationParams:
        return super().params(max_tokens, engine)._replace(logprobs=self.num_logprobs)


_RESERVED_VARIABLES = frozenset(("self", "messages", "tools", "add_generation_prompt"))


def parse_chat(body: dict[str, JSON]) -> tuple[ChatRequest, list[str]]:
    """A checked chat request, and the paths of the fields that nothing knows. Raises InvalidRequest."""
    check_model(body)
    ignored: list[str] = []
    chat = ChatRequest.parse(body, "", ignored)
    check_fields(chat)
    if chat.top_logprobs and not chat.logprobs:
        message = "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
        raise InvalidParameter(message, param="top_logprobs")
    for name in chat.chat_template_kwargs:
        if name in _RESERVED_VARIABLES:
            message = f"'{name}' is a parameter of its own and cannot be set in 'chat_template_kwargs'."
            raise InvalidParameter(message, param="chat_template_kwargs")
    last = chat.messages[-1]
    if chat.continue_final_message and not (isinstance(last, AssistantMessage) and _text(last.content) and not last.tool_calls):
        message = "With 'continue_final_message' the last message must be an assistant's, with text and without tool calls."
        raise InvalidParameter(message, param="continue_final_message")
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
