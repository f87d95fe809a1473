"""Tools on their way into a prompt: what a chat template can do with them, and messages rewritten for one that cannot.

Messages and tools are dicts as templates expect them, arguments of calls objects. Knows no HTTP and no token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from llmserve.engine.tool_formats import HERMES, Function, ToolFormat, describe, recognise, write_call, write_result
from llmserve.errors import TemplateError

JSON = Any
Messages = Sequence[Mapping[str, JSON]]
Render = Callable[..., str]
"""Messages and variables in, the prompt's text out. Raises TemplateError."""


class ToolSupport(NamedTuple):
    """What a template does by itself. `form` is how its model writes calls.

    `definitions`: it shows the tools, in a format that is known. `history`: it shows calls and their results.
    `short_ids`: it takes ids of nine letters and digits only. `one_call`: it shows one call of a message only, or refuses more.
    """

    form: ToolFormat = HERMES
    definitions: bool = False
    history: bool = False
    short_ids: bool = False
    one_call: bool = False


_PROBE = Function("probe_function_7", "probe description", {"type": "object", "properties": {"probe_key": {"type": "string"}}})
_QUESTION = {"role": "user", "content": "probe question"}


def probe(source: str, render: Render) -> ToolSupport:
    """Find out by rendering: a template that merely mentions tools may drop them."""
    form = recognise(source)
    shows_tools = _shows(render, [_QUESTION], (_PROBE.name, "probe_key"), tools=[_PROBE.definition()])
    support = ToolSupport(form or HERMES, definitions=shows_tools and form is not None)
    for call_ids in (("call_probe7", "call_probe8"), ("probe1234", "probe5678")):
        one, two = (_shows_exchange(render, call_ids[:count]) for count in (1, 2))
        if one:
            return support._replace(history=True, short_ids="_" not in call_ids[0], one_call=not two)
    return support


def adapt(messages: Messages, functions: Sequence[Function], support: ToolSupport) -> tuple[Messages, dict[str, JSON]]:
    """Messages, and variables beside them, by which a template shows the functions and every call and result."""
    if not support.history:
        messages = _as_text(messages)
    if support.history and support.one_call:
        messages = _one_by_one(messages)
    if support.history and support.short_ids:
        messages = [_with_short_ids(message) for message in messages]
    if not functions:
        return messages, {}
    if support.definitions:
        return messages, {"tools": [function.definition() for function in functions]}
    return _with_system(messages, describe(functions)), {}


def _shows_exchange(render: Render, call_ids: Sequence[str]) -> bool:
    """Whether a template shows a message of calls with these ids, and the results."""
    calls = [_call(call_id) for call_id in call_ids]
    results = [
        {"role": "tool", "content": f"result {call_id}", "tool_call_id": call_id, "name": _PROBE.name} for call_id in call_ids
    ]
    messages: Messages = [_QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
    words = [f"{what} {call_id}" for call_id in call_ids for what in ("value", "result")]
    return _shows(render, messages, [_PROBE.name, *words])


def _call(call_id: str) -> dict[str, JSON]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": _PROBE.name, "arguments": {"probe_key": f"value {call_id}"}},
    }


def _shows(render: Render, messages: Messages, words: Sequence[str], **variables: JSON) -> bool:
    try:
        prompt = render(messages, **variables)
    except TemplateError:
        return False
    return all(word in prompt for word in words)


def _as_text(messages: Messages) -> list[Mapping[str, JSON]]:
    """Calls as the words of the assistant, results as words of the user: those of one turn in one message."""
    texts: list[Mapping[str, JSON]] = []
    in_results = False
    for message in messages:
        if message["role"] == "tool":
            result = write_result(message["content"])
            if in_results:
                result = f"{texts.pop()['content']}\n{result}"
            texts.append({"role": "user", "content": result})
        else:
            texts.append(_with_calls_as_text(message))
        in_results = message["role"] == "tool"
    return texts


def _with_calls_as_text(message: Mapping[str, JSON]) -> Mapping[str, JSON]:
    calls = [write_call(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    if not calls:
        return message
    content = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}


def _one_by_one(messages: Messages) -> list[Mapping[str, JSON]]:
    """Each call in a message of its own with its results behind it, as if one function had been called after the other."""
    separate: list[Mapping[str, JSON]] = []
    position = 0
    while position < len(messages):
        results = list(takewhile(lambda each: each["role"] == "tool", messages[position + 1 :]))
        separate += _separate(messages[position], results)
        position += 1 + len(results)
    return separate


def _separate(message: Mapping[str, JSON], results: Messages) -> list[Mapping[str, JSON]]:
    calls = message.get("tool_calls", ())
    if len(calls) < 2:
        return [message, *results]
    separate: list[Mapping[str, JSON]] = []
    for call in calls:
        content = "" if separate else message["content"]
        separate.append({**message, "content": content, "tool_calls": [call]})
        separate += [result for result in results if result["tool_call_id"] == call["id"]]
    ids = {call["id"] for call in calls}
    return [*separate, *(result for result in results if result["tool_call_id"] not in ids)]


def _with_short_ids(message: Mapping[str, JSON]) -> Mapping[str, JSON]:
    if "tool_call_id" in message:
        return {**message, "tool_call_id": _short_id(message["tool_call_id"])}
    if "tool_calls" in message:
        return {**message, "tool_calls": [{**call, "id": _short_id(call["id"])} for call in message["tool_calls"]]}
    return message


def _short_id(call_id: str) -> str:
    return hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:9]


def _with_system(messages: Messages, text: str) -> list[Mapping[str, JSON]]:
    """`text` behind the system message, or in front of all as one."""
    first, *rest = messages
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}" if first["content"] else text}, *rest]
