"""The parameters of tools: definitions, which of them may or must be called, and the older `functions` in the same terms."""

from __future__ import annotations

from typing import NamedTuple

from llmserve.api import JSON
from llmserve.api.fields import (
    Array,
    Boolean,
    Either,
    Object,
    OneOf,
    String,
    Struct,
    Tagged,
    Unsupported,
    optional,
    required,
)
from llmserve.engine.tool_formats import Function
from llmserve.errors import InvalidParameter

_MAX_TOOLS = 128


class ToolUse(NamedTuple):
    """What an answer may call. `forced`: it is nothing but calls. `parallel`: there may be several.

    `legacy`: it was asked for, and is answered, in the words of `functions`.
    """

    functions: tuple[Function, ...] = ()
    forced: bool = False
    parallel: bool = True
    legacy: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)


class FunctionDefinition(Struct):
    name: str = required(String(1, 64, "[A-Za-z0-9_-]*"))
    description: str | None = optional(String())
    parameters: dict[str, JSON] | None = optional(Object())
    strict: bool = optional(Boolean(), False)


class Tool(Struct):
    type: str = required(String())
    function: FunctionDefinition = required(FunctionDefinition)


class FunctionName(Struct):
    name: str = required(String(1))


class NamedTool(Struct):
    type: str = required(String())
    function: FunctionName = required(FunctionName)


class AllowedTools(Struct):
    mode: str = required(OneOf(("auto", "required")))
    tools: tuple[NamedTool, ...] = required(Array(Tagged("type", {"function": NamedTool, "custom": Unsupported(Object())}), 1))


class AllowedToolsChoice(Struct):
    type: str = required(String())
    allowed_tools: AllowedTools = required(AllowedTools)


ToolChoice = str | NamedTool | AllowedToolsChoice

TOOLS = Array(Tagged("type", {"function": Tool, "custom": Unsupported(Object())}), max_length=_MAX_TOOLS)
TOOL_CHOICE = Either(
    OneOf(("none", "auto", "required")),
    Tagged("type", {"function": NamedTool, "allowed_tools": AllowedToolsChoice, "custom": Unsupported(Object())}),
)
FUNCTIONS = Array(FunctionDefinition, max_length=_MAX_TOOLS)
FUNCTION_CALL = Either(OneOf(("none", "auto")), FunctionName)


def resolve(tools: tuple[Tool, ...], choice: ToolChoice | None, *, parallel: bool) -> ToolUse:
    """What `tools` and `tool_choice` mean. Raises InvalidParameter."""
    functions = [_function(tool.function) for tool in tools]
    if choice in (None, "auto"):
        return ToolUse(tuple(functions), parallel=parallel)
    if choice == "none":
        return ToolUse()
    if not functions:
        raise _without_tools("tool_choice", "tools")
    if choice == "required":
        return ToolUse(tuple(functions), forced=True, parallel=parallel)
    if isinstance(choice, NamedTool):
        return ToolUse((_find(functions, choice.function.name, "tool_choice"),), forced=True, parallel=False)
    assert isinstance(choice, AllowedToolsChoice)
    allowed = {tool.function.name for tool in choice.allowed_tools.tools}
    for name in allowed:
        _find(functions, name, "tool_choice")
    chosen = tuple(function for function in functions if function.name in allowed)
    return ToolUse(chosen, forced=choice.allowed_tools.mode == "required", parallel=parallel)


def resolve_legacy(definitions: tuple[FunctionDefinition, ...], choice: str | FunctionName | None) -> ToolUse:
    """What `functions` and `function_call` mean. Raises InvalidParameter."""
    functions = [_function(definition) for definition in definitions]
    if choice == "none":
        return ToolUse(legacy=True)
    if isinstance(choice, FunctionName):
        if not functions:
            raise _without_tools("function_call", "functions")
        return ToolUse((_find(functions, choice.name, "function_call"),), forced=True, parallel=False, legacy=True)
    return ToolUse(tuple(functions), parallel=False, legacy=True)


def _function(definition: FunctionDefinition) -> Function:
    return Function(definition.name, definition.description, definition.parameters, definition.strict)


def _find(functions: list[Function], name: str, param: str) -> Function:
    for function in functions:
        if function.name == name:
            return function
    raise InvalidParameter(f"Invalid value for '{param}': the function {name!r:.80} is not among the tools.", param=param)


def _without_tools(param: str, needed: str) -> InvalidParameter:
    return InvalidParameter(
        f"Invalid value for '{param}': '{param}' is only allowed when '{needed}' are specified.", param=param
    )
