"""How the families of models write tool calls: what surrounds them, what they are forced by, how a history shows them.

Knows no HTTP and no model; texts and JSON values in, texts out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from llmserve.engine.json_schema import with_real_dates, without_others

JSON = Any

_COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}

_MOST_CALLS = 16  # that one forced answer may hold


class ToolFormat(NamedTuple):
    """`opener` and `closer` surround a call, or a list of calls. `bare`: an answer may also begin with a call as it is.

    `array`: the calls are members of one JSON array. `separator` is what may stand between two calls otherwise. `key` is the
    arguments' name.
    """

    opener: str
    closer: str = ""
    key: str = "arguments"
    bare: bool = False
    array: bool = False
    separator: str = ""


HERMES = ToolFormat("<tool_call>", "</tool_call>")
MISTRAL = ToolFormat("[TOOL_CALLS]", array=True)
LLAMA_3 = ToolFormat("<|python_tag|>", key="parameters", bare=True, separator=";")
FORMATS = (HERMES, MISTRAL, LLAMA_3)
CALL_MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>")


class Function(NamedTuple):
    """`parameters` is a JSON schema, None that of no parameters."""

    name: str
    description: str | None = None
    parameters: dict[str, JSON] | None = None
    strict: bool = False

    @property
    def schema(self) -> dict[str, JSON]:
        return (
            {"type": "object", "properties": {}, "additionalProperties": False} if self.parameters is None else self.parameters
        )

    def definition(self) -> dict[str, JSON]:
        """As templates expect it: OpenAI's own form."""
        function: dict[str, JSON] = {"name": self.name, "description": self.description or "", "parameters": self.schema}
        return {"type": "function", "function": function}


def recognise(template: str) -> ToolFormat | None:
    """The format that a chat template teaches its model, by what it writes around calls; None if it is none of these."""
    if "<function=" in template or "<arg_key>" in template:  # these wrap another syntax into the same marker
        return None
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    return LLAMA_3 if "<|python_tag|>" in template or '"parameters": dictionary' in template else None


def opening(form: ToolFormat) -> str:
    """What an answer that must be a call begins with. It is put at the prompt's end, so the model is not asked for it."""
    if form.bare:
        return ""
    return form.opener if form.array else f"{form.opener}\n"


def forced_grammar(form: ToolFormat, functions: Sequence[Function], *, parallel: bool) -> str:
    """A Lark grammar, in llguidance's dialect, of the rest of an answer that is one call, or several of them."""
    more = f"{{0,{_MOST_CALLS - 1}}}"
    if form.array:
        start = f'"[" call (", " call){more} "]"' if parallel else '"[" call "]"'
    elif form.closer:
        end, between = json.dumps(f"\n{form.closer}"), json.dumps(f"\n{form.opener}\n")
        start = f"call {end}" + (f" ({between} call {end}){more}" if parallel else "")
    else:
        start = f'call ("; " call){more}' if parallel else "call"
    return "\n".join([f"start: {start}", *_call_rules(form, functions)])


def guided_grammar(form: ToolFormat, functions: Sequence[Function], schema: str, *, parallel: bool) -> str:
    """A Lark grammar of an answer that is JSON of a schema, given as its JSON, or else calls."""
    opener = f"{json.dumps(opening(form))} " if opening(form) else ""
    calls = forced_grammar(form, functions, parallel=parallel).removeprefix("start: ")
    return f"start: answer | {opener}{calls}\nanswer: {_json(json.loads(schema))}"


def free_grammar(form: ToolFormat, functions: Sequence[Function]) -> str:
    """A Lark grammar of any text in which every call that is begun is a right one."""
    end = json.dumps(f"\n{form.closer}")
    rules = [
        f"start: (before call {end}){{0,{_MOST_CALLS}}} TEXT",
        f"before[lazy]: /(?s:.*){form.opener}/",
        f"TEXT: /(?s:.*)/ & ~/(?s:.*{form.opener}.*)/",
    ]
    return "\n".join([*rules, *_call_rules(form, functions, before="\n")])


def _call_rules(form: ToolFormat, functions: Sequence[Function], before: str = "") -> list[str]:
    """A call's head is as many literals as JSON has tokens: what is one literal to the lexer ends no sooner, so that behind the
    brace and quote that begin it no other object could go on.
    """
    rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(functions)))]
    for index, function in enumerate(functions):
        head = [f"{before}{{", '"name"', ": ", json.dumps(function.name), ", ", json.dumps(form.key), ": "]
        rules.append(f'call_{index}: {" ".join(map(json.dumps, head))} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: {_json(_closed(function.schema))}")
    return rules


def _closed(schema: dict[str, JSON]) -> dict[str, JSON]:
    """Arguments are an object whatever the schema leaves open, which cannot grow by made-up members."""
    return {"type": "object", **without_others(schema)}


def _json(schema: dict[str, JSON]) -> str:
    """What a rule is made of whose JSON is valid by the schema, in a form that cannot grow by white space."""
    return f"%json {json.dumps(with_real_dates(schema) | _COMPACT)}"


def describe(functions: Sequence[Function]) -> str:
    """What a model is told whose template knows nothing of tools."""
    definitions = "\n".join(json.dumps(function.definition()["function"], ensure_ascii=False) for function in functions)
    return (
        "You can call functions. These are available, one JSON object per line, each with the JSON schema of its parameters:\n"
        f"{definitions}\n"
        "To call one, write exactly this, with the function's name and an object of arguments:\n"
        f'{HERMES.opener}\n{{"name": "NAME", "arguments": {{}}}}\n{HERMES.closer}\n'
        "The result comes back between <tool_response> and </tool_response>. When no function is needed, answer as usual."
    )


def write_call(name: str, arguments: JSON) -> str:
    """A call in a history, for a template that knows nothing of tools. `arguments` is an object, or text that spells none."""
    spelled = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{HERMES.opener}\n{{"name": {json.dumps(name)}, "arguments": {spelled}}}\n{HERMES.closer}'


def write_result(content: str) -> str:
    """A tool's result in a history, for the same."""
    return f"<tool_response>\n{content}\n</tool_response>"
